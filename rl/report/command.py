"""`python -m rl report RUN_DIR`: writes the report of a run, or of a pipeline of runs, in any state."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.report.completions import choose
from rl.report.page import page
from rl.report.read import ReportError, read_report
from rl.run.checkpoint import write_file

NAME = "report.html"
SAMPLES = 400


def write_report(folder: Path, out: Path | None = None, samples: int = SAMPLES) -> Path:
    """Writes the report to `out`, or into the folder, and returns where. Raises ReportError."""
    report = read_report(folder)
    text = page(report, choose(report.runs, samples))
    target = folder / NAME if out is None else out
    if target.is_dir():
        raise ReportError(f"--out {target} is a folder; give a file, such as {target / NAME}")
    try:
        write_file(target, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise ReportError(f"{target} cannot be written: {error.strerror}; give another with --out") from error
    return target


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rl report", description="Write a run, or a pipeline of runs, as one offline HTML file."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or of a pipeline's stages")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write (RUN_DIR/{NAME})")
    parser.add_argument(
        "--samples",
        type=_count,
        default=SAMPLES,
        metavar="N",
        help=f"at most N completions in all ({SAMPLES}); 0 = none",
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run, options.out, options.samples))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of completions")
    return int(text)
