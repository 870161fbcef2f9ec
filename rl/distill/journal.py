"""What a teacher sent, appended to a file and flushed to disk before it counts: a kill loses nothing that was received.

One JSON object a line. The key says what was asked, so a restart asks only for what is not there; a line that a kill
left unfinished is cut off, and asked for again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rl.recipe_io import RecipeError


@dataclass(frozen=True)
class Wanted:
    """Trace number `sample` of a problem, under settings of this hash (teacher, sampling, prompt, seed)."""

    id: str
    sample: int
    settings: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.id, self.sample, self.settings


@dataclass(frozen=True)
class Received(Wanted):
    """A teacher's response as it came; or, with `error`, its refusal, which asking again would not change."""

    content: str = ""
    reasoning: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


Key = tuple[str, int, str]


def read_journals(folder: Path) -> dict[Key, Received]:
    """Everything received so far, by all processes; of the same key the first."""
    found: dict[Key, Received] = {}
    for record in _records(folder):
        found.setdefault(record.key, record)
    return found


def read_keys(folder: Path) -> set[Key]:
    """Of what has been received, without holding it in memory."""
    return {record.key for record in _records(folder)}


def _records(folder: Path) -> Iterator[Received]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                record = _parse(line)
                if record is not None:
                    yield record


def _parse(line: bytes) -> Received | None:
    """None for a line that is torn, or not ours: what it would have held is asked for again."""
    try:
        return Received(**json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


class Journal:
    """The file of one process, open for appending and locked against a second run of the same folder."""

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{rank}.jsonl").open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RecipeError(
                f"output_dir: another run is writing to {folder}; wait for it, or give another output_dir"
            ) from None
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        """Drops what stands after the last line break, as bytes appended to it would be lost with it."""
        end = self._file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            size = min(start, 1 << 16)
            self._file.seek(start - size)
            place = self._file.read(size).rfind(b"\n")
            if place >= 0:
                self._file.truncate(start - size + place + 1)
                return
            start -= size
        self._file.truncate(0)

    def append(self, records: Sequence[Received]) -> None:
        """On disk when it returns."""
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()  # which releases the lock

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def missing(wanted: Iterable[Wanted], found: Container[Key]) -> list[Wanted]:
    return [trace for trace in wanted if trace.key not in found]
