"""The report in a real browser: nothing is fetched, nothing breaks out, the keyboard reaches and works everything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from report_runs import HOSTILE, pipeline
from webdriver import Browser, chromium, missing

from rl.report.command import write_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# What is in the list of completions now, one dictionary a row.
ROWS = """return [...document.querySelectorAll('#browser-list > li')].map((li) => {
  const [verdict, reward, tokens, step] = [...li.querySelectorAll('summary > span')].map((span) => span.textContent);
  return { verdict, reward: +reward.split(' ')[1], tokens: parseInt(tokens), step: +step.split(' ')[1] };
})"""
FOCUSABLE = """[...document.querySelectorAll('a[href], button, select, input, summary, [tabindex="0"]')]
  .filter((e) => e.checkVisibility())"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(pipeline(tmp_path_factory.mktemp("runs") / "all"), samples=1000)


@pytest.fixture(autouse=True)
def opened(browser: Browser, report: Path) -> None:
    browser.resize(1280, 900)
    browser.colours("light")
    browser.log("browser")
    browser.log("performance")
    browser.go(report)


def focus(browser: Browser, selector: str) -> None:
    browser.script("document.querySelector(arguments[0]).focus()", selector)


def eventually(happened: Callable[[], bool]) -> None:
    """What unfolds is filled in by an event that comes a moment later."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def shown(browser: Browser, selector: str) -> str:
    return str(browser.script("return document.querySelector(arguments[0]).textContent", selector))


def test_it_draws_everything_and_fetches_nothing(browser: Browser, report: Path) -> None:
    drawn, figures = browser.script(
        "return [document.querySelectorAll('figure .plot > svg').length, document.querySelectorAll('figure').length]"
    )
    assert drawn == figures > 30
    browser.script("for (const d of document.querySelectorAll('details')) d.open = true")
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [report.as_uri()]
    assert browser.log("browser") == []


def test_completions_are_text(browser: Browser) -> None:
    """The hostile ones are found, opened and read back; none of them has run or become an element."""
    for text in HOSTILE:
        told = text.replace("\ud800", "")
        browser.script(
            "const t = document.getElementById('by-text'); t.value = arguments[0];"
            "t.dispatchEvent(new Event('input', {bubbles: true}))",
            told.lower(),
        )
        browser.script("document.querySelector('#browser-list details').open = true")
        read = "return document.querySelectorAll('#browser-list .sample pre')"
        assert browser.script(f"{read}.length") == 2
        assert browser.script(f"{read}[0].textContent") == browser.script(f"{read}[1].textContent") == told
    browser.script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.script("return window.broken ?? null") is None
    assert browser.script("return document.querySelectorAll('img, iframe, object, embed, section svg a').length") == 0
    # Were there a hole all the same: a script that is not the page's own does not run.
    browser.script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    )
    assert browser.script("return window.broken ?? null") is None
    assert "Content Security Policy" in " ".join(entry["message"] for entry in browser.log("browser"))


def test_the_keyboard_reaches_everything(browser: Browser) -> None:
    count = browser.script(f"return {FOCUSABLE}.length")
    browser.script(
        "window.reached = new Set(); document.addEventListener('focusin', (e) => {"
        "  reached.add(e.target); window.outlined = getComputedStyle(e.target).outlineStyle; })"
    )
    browser.press(*["Tab"] * (count + 5))
    missed = browser.script(f"return {FOCUSABLE}.filter((e) => !reached.has(e)).map((e) => e.outerHTML)")
    assert missed == [] and count > 100
    assert browser.script("return outlined") == "solid"


def test_the_arrow_keys_read_a_figure(browser: Browser) -> None:
    titles = browser.script("return [...document.querySelectorAll('figure strong')].map((e) => e.textContent)")
    browser.script("document.querySelectorAll('.plot')[arguments[0]].focus()", titles.index("Reward"))
    tip = "return document.querySelectorAll('figure')[arguments[0]].querySelector('.tip')"
    browser.press("Right", "Right", "Right")
    assert browser.script(f"{tip}.innerText", titles.index("Reward")).split("\n")[:2] == ["step 3", "total 0.1906"]
    browser.press("End")
    assert browser.script(f"{tip}.innerText", titles.index("Reward")).startswith("step 40")
    browser.press("Tab", "Tab", "Space")  # the second curve of the legend
    assert browser.script("return document.activeElement.getAttribute('aria-pressed')") == "false"
    curves = "return document.querySelectorAll('figure')[arguments[0]].querySelectorAll('.curve').length"
    assert browser.script(curves, titles.index("Reward")) == 2
    browser.press("Tab", "Tab", "Enter")  # the table of values
    rows = "return [...document.activeElement.parentNode.querySelectorAll('tr')].map((r) => r.innerText)"
    eventually(lambda: len(browser.script(rows)) == 41)
    cells = browser.script(rows)
    assert cells[0].split() == ["step", "total", "format", "math"]
    assert cells[3].split() == ["3", "0.1906", "0.3", "0.09063"]


def test_completions_are_filtered_ordered_and_paged_by_keyboard(browser: Browser) -> None:
    assert shown(browser, "#browser-count") == "677 of 677 completions match"
    steps = [row["step"] for row in browser.script(ROWS)]
    assert len(steps) == 20 and steps == sorted(steps, reverse=True)

    focus(browser, "#by-order")
    browser.press("h")  # highest reward first
    assert [row["reward"] for row in browser.script(ROWS)] == [1] * 20
    browser.press("End")  # shortest first
    tokens = [row["tokens"] for row in browser.script(ROWS)]
    assert tokens == sorted(tokens)
    focus(browser, "#page-next")
    browser.press("Enter", "Space")
    assert shown(browser, "#page-now") == "page 3 of 34"
    assert [row["tokens"] for row in browser.script(ROWS)][0] >= tokens[-1]
    focus(browser, "#page-before")
    browser.press(*["Enter"] * 5)  # stops at the first page and keeps the focus
    assert shown(browser, "#page-now") == "page 1 of 34"
    assert browser.script("return document.activeElement.id") == "page-before"

    focus(browser, "#by-verdict")
    browser.press("t")
    rows = browser.script(ROWS)
    assert rows and {row["verdict"] for row in rows} == {"timeout"}
    focus(browser, "#by-least")
    browser.press(*"0.15")
    focus(browser, "#by-most")
    browser.press(*"0.3")
    rows = browser.script(ROWS)
    assert rows and all(0.15 <= row["reward"] <= 0.3 for row in rows)
    focus(browser, "#by-text")
    browser.press(*"no such text")
    assert browser.script(ROWS) == [] and shown(browser, "#browser-count") == "0 of 677 completions match"

    focus(browser, "#filters button")
    browser.press("Enter")
    browser.script("return new Promise((done) => setTimeout(done))")
    assert shown(browser, "#browser-count") == "677 of 677 completions match"
    focus(browser, "#browser-list summary")
    browser.press("Enter")
    eventually(lambda: "gold answer" in shown(browser, "#browser-list details[open]"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(scheme: str, width: int, browser: Browser, tmp_path: Path) -> None:
    browser.colours(scheme)
    browser.resize(width, 800)
    browser.script("for (const d of document.querySelectorAll('details')) d.open = true")
    browser.script("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.script("return document.documentElement.scrollWidth") <= width
    out = browser.script(
        "return [...document.querySelectorAll('figure, form *, h1, h2, dd, svg, summary')]"
        ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => e.outerHTML)"
    )
    assert out == []
    for selector in ("body", ".note", "a", "summary", "dt", ".legend button", "thead th", "#browser-count"):
        colours = browser.script(
            "const e = document.querySelector(arguments[0]);"
            "return [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]",
            selector,
        )
        assert contrast(*colours) >= 4.5, (selector, colours)
    browser.screenshot(tmp_path / f"{scheme}-{width}.png")  # to be looked at


def contrast(text: str, back: str) -> float:
    """WCAG's ratio of two `rgb(r, g, b)`."""
    lights = []
    for colour in (text, back):
        channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
