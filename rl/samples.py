"""`rl samples`: the completions of a run, picked by verdict and step. Reads the Parquet files that the run writes.

python -m rl samples runs/NAME --verdict unparsed --limit 5
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.compose import VERDICTS
from rl.recipe_io import nearest

_COLUMNS = [
    "step", "group", "id", "prompt_text", "completion", "answer", "reward", "components", "verdict", "finish_reason",
    "tokens",
]  # fmt: skip
# An evaluation's is named after its set; one that a kill left half written begins with a dot.
_FILE = re.compile(r"(?:([^.].*)_)?step_(\d+)\.parquet")
_TAIL = 200  # characters of a completion that is not shown in full: its end, where the answer should stand
# Completions are untrusted: an escape sequence among them must not reach the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class SamplesError(ValueError):
    """The folder is not a run, or holds no such samples; the message says what to give instead."""


@dataclass(frozen=True)
class Query:
    """Which samples: of a verdict, of steps in first..last, of evaluation set `evaluated` instead of the training."""

    verdict: str | None = None
    first: int = 0
    last: int = sys.maxsize
    evaluated: str | None = None


def find_samples(folder: Path, query: Query) -> tuple[int, Iterator[dict[str, Any]]]:
    """How many samples match, and the samples, newest step first. Raises SamplesError."""
    files = [(step, file) for step, file in _files(folder, query.evaluated) if query.first <= step <= query.last]
    matching = [(file, places) for _, file in sorted(files, reverse=True) if (places := _places(file, query.verdict))]
    return sum(len(places) for _, places in matching), _rows(matching)


def sample_files(folder: Path) -> dict[str | None, list[tuple[int, Path]]]:
    """(step, file) of all samples of a run, by evaluated set; None is the training."""
    files: dict[str | None, list[tuple[int, Path]]] = {}
    for file in [*folder.glob("samples/*.parquet"), *folder.glob("evaluation/*.parquet")]:
        match = _FILE.fullmatch(file.name)
        if match:
            files.setdefault(match[1], []).append((int(match[2]), file))
    return files


def _files(folder: Path, evaluated: str | None) -> list[tuple[int, Path]]:
    """(step, file) of the training's samples, or of an evaluation's; of the only kind there is, if nothing is said."""
    if not (folder / "recipe.yaml").is_file():
        raise SamplesError(_no_run(folder))
    files = sample_files(folder)
    sets = sorted(name for name in files if name is not None)
    if not files:
        raise SamplesError(f"{folder} holds no samples (yet)")
    if evaluated is None and None not in files:
        if len(sets) > 1:
            raise SamplesError(f"{folder} has evaluations only; say of which set with --set: {', '.join(sets)}")
        return files[sets[0]]
    if evaluated not in files:
        near = nearest(str(evaluated), sets)
        raise SamplesError(f"{folder} has no evaluated set {evaluated!r}{near}; sets: {', '.join(sets) or 'none'}")
    return files[evaluated]


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"no folder {folder}{nearest(folder.name, beside)}"
    stages = sorted(path.parent.name for path in folder.glob("*/recipe.yaml"))
    if stages:
        return f"{folder} holds several runs; give one of: {', '.join(str(folder / stage) for stage in stages)}"
    return f"{folder} is not the folder of a run: it has no recipe.yaml"


def _places(file: Path, verdict: str | None) -> list[int]:
    import pyarrow.parquet as pq

    found = pq.read_table(file, columns=["verdict"])["verdict"].to_pylist()
    return [i for i, value in enumerate(found) if verdict is None or value == verdict]


def _rows(matching: Sequence[tuple[Path, list[int]]]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for file, places in matching:
        yield from pq.read_table(file, columns=_COLUMNS).take(places).to_pylist()


# ---- what is printed -----------------------------------------------------------------------------


def describe(row: dict[str, Any], full: bool) -> str:
    """A line about the sample, its components, and the end of its text, or all of prompt and text."""
    head = [
        f"step {row['step']}",
        f"group {row['group']}",
        row["verdict"] or "no verdict",
        f"reward {'none' if row['reward'] is None else format(row['reward'], '.4g')}",
        f"{row['tokens']} tokens" + (" (cut off)" if row["finish_reason"] == "length" else ""),
        f"answer {row['answer']!r}",
        f"id {row['id']}",
    ]
    if full:
        parts = ["--- prompt", row["prompt_text"], "--- completion", row["completion"]]
    else:
        text = " ".join(row["completion"].split())
        parts = ["    " + ("… " + text[-_TAIL:] if len(text) > _TAIL else text)]
    return _visible("\n".join(["  ".join(head), f"    {row['components']}", *parts]))


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rl samples", description="List completions of a run, newest step first."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--verdict", choices=VERDICTS)
    parser.add_argument("--step", type=_steps, default=(0, sys.maxsize), metavar="N|A:B", help="one step, or A to B")
    parser.add_argument("--set", metavar="NAME", help="of this evaluated set instead of the training")
    parser.add_argument("--limit", type=_positive, default=20, metavar="N", help="at most N samples (20)")
    parser.add_argument("--full", action="store_true", help="the whole prompt and completion")
    options = parser.parse_args(arguments)
    try:
        first, last = options.step
        total, rows = find_samples(options.run, Query(options.verdict, first, last, options.set))
    except SamplesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        shown = 0
        for row in rows:
            if shown == options.limit:
                break
            print(describe(row, options.full), end="\n\n")
            shown += 1
        kind = f"{options.verdict} " if options.verdict else ""
        print(f"{shown} of {total} {kind}samples")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)|(\d*):(\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step such as 12 nor a range such as 10:20")
    if match[1]:
        return int(match[1]), int(match[1])
    return int(match[2] or 0), int(match[3] or sys.maxsize)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
