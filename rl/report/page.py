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
from rl.report.figures import Figure, figures
from rl.report.overview import facts, overview, state
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
    columns, bodies = overview(report.runs)
    if not report.stages:  # the name of the only run is the title
        columns, bodies = columns[1:], [[row[1:] for row in rows] for rows in bodies]
    head = "".join(f'<th scope="col"{_words(name)}>{escape(name)}</th>' for name in columns)
    body = "".join(f"<tbody>{''.join(_row(columns, row) for row in rows)}</tbody>" for rows in bodies)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="overview"><thead><tr>{head}</tr></thead>{body}</table></div>'
    )


def _row(columns: Sequence[str], row: Sequence[str]) -> str:
    first = f'<th scope="row">{escape(row[0])}</th>'
    cells = [f"<td{_words(name)}>{escape(value)}</td>" for name, value in zip(columns[1:], row[1:], strict=True)]
    return f"<tr>{first}{''.join(cells)}</tr>"


def _words(column: str) -> str:
    return ' class="words"' if column in _WORDS else ""


def _section(run: RunData, number: int, drawn: Sequence[Figure], first: int, named: bool) -> str:
    """A run's facts, figures by group, documents, recipe and versions. first: number of its first figure."""
    name = escape(run.name if named else "Run")
    anchor = f"run-{number}"
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(run))
    parts = [
        f'<section aria-labelledby="{anchor}">',
        f'<h2 id="{anchor}">{name}</h2>',
        f'<dl class="facts">{listed}</dl>',
    ]
    for group in dict.fromkeys(figure.group for figure in drawn):
        framed = [_figure(figure, first + i) for i, figure in enumerate(drawn) if figure.group == group]
        parts.append(f'<h3>{escape(group)}</h3><div class="figures">{"".join(framed)}</div>')
    parts += [_document(title, text) for title, text in run.documents.items()]
    parts.append(_document("Recipe", run.recipe_text))
    parts.append(_document("Versions", "\n".join(f"{k}: {v}" for k, v in run.versions.items())))
    return "\n".join([*filter(None, parts), "</section>"])


def _figure(figure: Figure, number: int) -> str:
    note = f' <span class="note">{escape(figure.note)}</span>' if figure.note else ""
    caption = f"<figcaption><strong>{escape(figure.title)}</strong>{note}</figcaption>"
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
