"""The page: data in, HTML out. Everything that comes from a run is escaped; nothing in it is ever markup or code."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rl.report.completions import Source
from rl.report.figures import Figure, figures, steps_per_point
from rl.report.overview import Overview, facts, overview, state
from rl.report.read import Report, RunData

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("dom.js", "charts.js", "browser.js")
_WORDS = ("stage", "kind", "state", "problems")  # columns of words stand to the left


def page(report: Report, sources: Sequence[Source]) -> str:
    """The whole file. Only its own style and script may run in it, by their hashes; it may fetch nothing."""
    style, script = _asset("page.css"), "\n".join(map(_asset, _SCRIPTS))
    drawn = [figures(run) for run in report.runs]
    shown = [
        {"run": source.run if report.stages else "", "name": source.name, "total": source.total, "rows": source.rows}
        for source in sources
    ]
    sections, first = [], 0
    for number, (run, of_run) in enumerate(zip(report.runs, drawn, strict=True)):
        sections.append(_section(run, number, of_run, first, named=report.stages))
        first += len(of_run)
    return Template(_asset("page.html")).substitute(
        title=escape(report.name),
        lead=escape(_lead(report)),
        navigation=_navigation(report, any(source.rows for source in sources)),
        overview=_overview(report),
        sections="\n".join(sections),
        browser_hidden="" if any(source.rows for source in sources) else " hidden",
        appendix=_document("Recipe of the pipeline", report.recipe_text),
        data=data_block({"figures": [figure.record() for of_run in drawn for figure in of_run], "sources": shown}),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )


def data_block(value: Any) -> str:
    """JSON that may stand in a script element: no `<`, so no end tag and no comment, whatever the strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: other characters are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lead(report: Report) -> str:
    if not report.stages:
        (run,) = report.runs
        return f"{run.pipeline} · {state(run)}"
    done = sum(run.complete for run in report.runs)
    return f"pipeline of {len(report.runs)} stages · {done} complete"


def _navigation(report: Report, with_completions: bool) -> str:
    places = [("results", "Results")]
    places += [(f"run-{number}", run.name if report.stages else "Run") for number, run in enumerate(report.runs)]
    if with_completions:
        places.append(("completions", "Completions"))
    return "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in places)


def _overview(report: Report) -> str:
    table = overview(report.runs, named=report.stages)
    head = "".join(f'<th scope="col"{_words(name)}>{escape(name)}</th>' for name in table.columns)
    body = "".join(f"<tbody>{_rows(table, rows)}</tbody>" for rows in table.bodies)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="overview"><thead><tr>{head}</tr></thead>{body}</table></div>'
    )


def _rows(table: Overview, rows: Sequence[Sequence[str]]) -> str:
    """The rows of one run; cells that would be the same in all of them are one."""
    made = []
    for r, row in enumerate(rows):
        cells = []
        for c, (name, value) in enumerate(zip(table.columns, row, strict=True)):
            if c >= table.of_run:
                cells.append(f"<td{_words(name)}>{escape(value)}</td>")
            elif r == 0:
                tag, scope = ("th", ' scope="rowgroup"') if c == 0 else ("td", "")
                cells.append(f'<{tag}{scope} rowspan="{len(rows)}"{_words(name)}>{escape(value)}</{tag}>')
        made.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(made)


def _words(column: str) -> str:
    return ' class="words"' if column in _WORDS else ""


def _section(run: RunData, number: int, drawn: Sequence[Figure], first: int, named: bool) -> str:
    """A run's facts, figures by group, documents, recipe and versions. first: number of its first figure."""
    name = escape(run.name if named else "Run")
    anchor = f"run-{number}"
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts(run))
    parts = [
        f'<section aria-labelledby="{anchor}">',
        f'<h2 id="{anchor}">{name}</h2>',
        f'<dl class="facts">{listed}</dl>',
    ]
    if steps_per_point(run) > 1:
        parts.append(f'<p class="note">A point of a curve is the mean of {steps_per_point(run)} steps.</p>')
    for group in dict.fromkeys(figure.group for figure in drawn):
        framed = [_figure(figure, first + i) for i, figure in enumerate(drawn) if figure.group == group]
        parts.append(f'<h3>{escape(group)}</h3><div class="figures">{"".join(framed)}</div>')
    parts += [_document(title, text) for title, text in run.documents.items()]
    parts.append(_document("Recipe", run.recipe_text))
    parts.append(_document("Versions", "\n".join(f"{k}: {v}" for k, v in run.versions.items())))
    return "\n".join([*filter(None, parts), "</section>"])


def _figure(figure: Figure, number: int) -> str:
    title, note = escape(figure.title), escape(figure.note)
    caption = f'<figcaption><strong>{title}</strong><span class="note">{note}</span></figcaption>'
    return f'<figure data-figure="{number}">{caption}</figure>'


def _document(title: str, text: str) -> str:
    """A text to be unfolded; nothing where there is none."""
    if not text:
        return ""
    label = escape(title)
    return (
        f'<details class="document"><summary>{label}</summary>'
        f'<pre tabindex="0" role="region" aria-label="{label}">{escape(text)}</pre></details>'
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
