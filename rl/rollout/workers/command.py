"""A rollout worker: an engine behind HTTP, in a process of its own.

    python -m rl rollout-worker --model PATH --secret-file FILE [--engine local|vllm] [--host 127.0.0.1] [--port 0]
        [--device cuda|cpu] [--cores 0-3] [--announce FILE] [--bucket-folder DIR] [engine option=value ...]

Options of the engine are those of LocalEngine (dtype, precision, threads, max_slots, prefill_tokens, draft_tokens,
record_routing), or vLLM's engine arguments (tensor_parallel_size, gpu_memory_utilization, ...); values are YAML.
Anybody who knows the secret can replace the weights: see docs/rollouts.md before binding to another address.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from rl import yaml_text
from rl.recipe_io import RecipeError
from rl.rollout.engine import Engine

SHORTEST_SECRET = 16
LAST_WORDS_S = 6.0  # a trainer looks at its workers every 5 s or sooner


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m rl rollout-worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("local", "vllm"), default="local")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = a free one")
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--device", help="of a local engine; default: the GPU if there is one")
    parser.add_argument("--cores", help="CPU cores to keep to, such as 0-3,6")
    parser.add_argument("--announce", type=Path, help="file to write the URL to when ready, as JSON")
    parser.add_argument("--bucket-folder", type=Path, help="where transport `files` puts weights")
    parser.add_argument("--parent", type=int, help="process with whose end this one ends")
    parser.add_argument("options", nargs="*", metavar="option=value", help="of the engine")
    given = parser.parse_args(arguments)
    try:
        secret = read_secret(given.secret_file)
        options = engine_options(given.options)
        if given.cores:
            os.sched_setaffinity(0, cores_of(given.cores))
        if given.device:
            options["device"] = given.device
        return serve(given, secret, options)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(given: argparse.Namespace, secret: str, options: Mapping[str, Any]) -> int:
    """Until told to stop (0), or until the engine fails (1)."""
    from rl.rollout.workers.loop import EngineLoop
    from rl.rollout.workers.receiving import shared_folder
    from rl.rollout.workers.server import WorkerServer

    engine = make_engine(given.engine, given.model, options)
    loop = EngineLoop(engine, given.engine, Remake(given.engine, given.model, options))
    server = WorkerServer((given.host, given.port), loop, secret, given.bucket_folder or shared_folder())
    stop, started_by = threading.Event(), os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    loop.start()
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    if given.announce:
        write_whole(given.announce, json.dumps({"url": server.url, "pid": os.getpid()}))
    print(f"rollout worker ready at {server.url}", flush=True)

    def wanted() -> bool:
        return not (stop.is_set() or server.asked_to_stop) and _has_parent(given.parent, started_by)

    while wanted() and loop.alive:
        time.sleep(0.2)
    end = time.monotonic() + (LAST_WORDS_S if loop.fault else 0.0)
    while wanted() and time.monotonic() < end:  # so that the trainer hears why
        time.sleep(0.2)
    server.shutdown()
    loop.stop()
    return 1 if loop.fault else 0


class Remake:
    """Starts the same engine anew from a checkpoint of new weights, for engines that cannot take any."""

    def __init__(self, kind: str, model: str, options: Mapping[str, Any]):
        self.kind, self.options = kind, options
        self._source = Path(model).expanduser()
        self._written: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> Engine:
        from rl.rollout.workers.rebuild import write_checkpoint

        folder = tempfile.TemporaryDirectory(prefix="r1forge-worker-")
        target = Path(folder.name) / "model"
        write_checkpoint(self._source, named_tensors, target)
        engine = make_engine(self.kind, str(target), self.options)
        engine.version = version
        self._source, self._written = target, folder  # the one before goes with its last reference
        return engine


def make_engine(kind: str, model: str, options: Mapping[str, Any]) -> Engine:
    if kind == "local":
        from rl.rollout.local import LocalSampler
        from rl.rollout.local_engine import LocalEngine

        known = {*_keywords(LocalEngine.load), *_keywords(LocalSampler.__init__)}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"a local engine has no option {unknown[0]}; it has {', '.join(sorted(known))}")
        return LocalEngine.load(model, **options)
    from rl.rollout.vllm_engine import VLLMEngine

    own = {name: value for name, value in options.items() if name in _keywords(VLLMEngine.__init__)}
    extra = {name: value for name, value in options.items() if name not in own}
    return VLLMEngine(model, **own, extra=extra)


def engine_options(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs, whose values are read as YAML."""
    options: dict[str, Any] = {}
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"engine option {pair!r} must look like name=value")
        try:
            options[name] = yaml_text.parse(text)
        except yaml.YAMLError as error:
            raise ValueError(f"engine option {name}: the value is not valid YAML: {error}") from error
    return options


def read_secret(path: Path) -> str:
    secret = path.read_text(encoding="utf-8").strip()
    if len(secret) < SHORTEST_SECRET or not (secret.isascii() and secret.isprintable()):
        raise ValueError(
            f"{path}: a secret has at least {SHORTEST_SECRET} printable ASCII characters, such as those of "
            "`openssl rand -hex 32`"
        )
    return secret


def cores_of(text: str) -> set[int]:
    """{0, 1, 2, 3, 6} of `0-3,6`."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ValueError(f"cores: {text!r} must look like 0-3,6")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


def write_whole(path: Path, text: str) -> None:
    """So that nobody reads half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _keywords(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("extra", "progress", "version")}


def _has_parent(parent: int | None, started_by: int) -> bool:
    """Whether the process that this one is to end with is there. Its own parent may be a script in between."""
    if parent is None:
        return True
    try:
        os.kill(parent, 0)
    except OSError:
        return False
    return os.getppid() == started_by
