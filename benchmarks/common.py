"""What the benchmarks share: prompts, tables, peak memory, a subprocess for each measurement."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana")
GOODS = ("apples", "marbles", "stamps", "pencils", "shells", "coins", "cards", "beads", "buttons", "books")


def synthetic_prompts(count: int) -> list[str]:
    """`count` different word problems of about 40 tokens (in SmolLM2's vocabulary)."""
    prompts = []
    for i in range(count):
        name, goods = NAMES[i % len(NAMES)], GOODS[i % len(GOODS)]
        prompts.append(
            f"Question: {name} has {12 + i} {goods}, buys {3 + i % 7} boxes with {4 + i % 5} in each, and "
            f"then gives {1 + i % 9} away to a friend. How many {goods} are left? Answer:"
        )
    return prompts


def load_texts(data: str | None, count: int) -> list[str]:
    """The first `count` problem statements of a problem file, or synthetic ones."""
    if data is None:
        return synthetic_prompts(count)
    from data import load_problems

    texts = list(load_problems({"path": data, "limit": count})["problem"])
    if len(texts) < count:
        raise SystemExit(f"{data} has {len(texts)} problems, {count} are needed")
    return texts


def token_parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs within nearly every group: parity of the sum of token ids.

    (Of the length it would be the same for all: every completion has the same length.)
    """
    return [float(sum(ids) % 2) for ids in completion_ids]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GiB.

    VmHWM where there is a /proc: on Linux `ru_maxrss` of a child starts at what its *parent* held when it
    forked, so a small worker of a big parent would be charged for the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class WorkerFailed(RuntimeError):
    """A measuring process did not end well."""


def run_worker(script: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `script --worker SETTINGS_FILE` in a fresh interpreter, which writes settings["result"].

    settings["scratch"] is a folder to write to. The worker's output goes to stderr: stdout holds only tables.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "settings.json"), Path(folder, "result.json")
        given.write_text(json.dumps({**settings, "result": str(result), "scratch": folder}))
        command = [sys.executable, script, "--worker", str(given)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        if Path(str(settings["model"])).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        status = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
        if status:
            raise WorkerFailed(f"failed with status {status}, see above")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    summary, _, rest = (description or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id of a causal LM (see fetch_smollm2.py)")
    parser.add_argument("--data", help="problem file (.jsonl, .parquet, ...); default: synthetic prompts")
    parser.add_argument("--threads", type=int, default=cores(), help="torch threads (default: all cores)")
    parser.add_argument("--json", metavar="OUT", help="also write every number here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)]
    return "\n".join([line(columns), f"|{'|'.join(rule)}|", *map(line, rows)])


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    names = ("torch", "transformers", "accelerate", "trl")
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {"cpu": cpu, "threads": threads, "python": platform.python_version(), **_versions(names)}


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: str | None, value: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
