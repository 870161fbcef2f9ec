"""Scores that were paid for once: a bounded cache in memory, or a file that runs and processes share."""

import logging
import os
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class ScoreCache(Protocol):
    """Scores by key; callable from any thread."""

    def get(self, key: str) -> float | None: ...

    def put(self, key: str, score: float) -> None: ...


class MemoryCache:
    """The most recently used scores of this process."""

    def __init__(self, size: int = 1 << 16):
        self._scores: OrderedDict[str, float] = OrderedDict()
        self._size = size
        self._lock = threading.Lock()

    def get(self, key: str) -> float | None:
        with self._lock:
            if key not in self._scores:
                return None
            self._scores.move_to_end(key)
            return self._scores[key]

    def put(self, key: str, score: float) -> None:
        with self._lock:
            self._scores[key] = score
            self._scores.move_to_end(key)
            if len(self._scores) > self._size:
                self._scores.popitem(last=False)


class FileCache:
    """An SQLite file. A resumed run finds the scores of the steps that it makes again.

    A file that fails later (a full disk, a lock held for a minute) costs a request, not the run.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        self._connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")

    def get(self, key: str) -> float | None:
        found = self._execute("SELECT score FROM scores WHERE key = ?", (key,))
        return float(found[0][0]) if found else None

    def put(self, key: str, score: float) -> None:
        self._execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[float]]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                logger.warning("score cache: %s", error)
                return []


def check_cache(path: str | None) -> None:
    """Raise ValueError if no file can be written at `path`; creates nothing."""
    if path is None:
        return
    if not isinstance(path, str) or not path:
        raise ValueError(f"cache must be a file's path, not {path!r}")
    file = Path(path).expanduser().absolute()
    nearest = next((folder for folder in file.parents if folder.exists()), file)
    if file.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"cache {path}: no file can be written there")


_open: dict[str | None, ScoreCache] = {}
_opening = threading.Lock()


def score_cache(path: str | None) -> ScoreCache:
    """The cache of this process for `path` (None: in memory). Raises ValueError if the file cannot be one."""
    name = None if path is None else str(Path(path).expanduser().resolve())
    with _opening:
        if name not in _open:
            try:
                _open[name] = MemoryCache() if name is None else FileCache(Path(name))
            except (OSError, sqlite3.Error) as error:
                raise ValueError(f"cache {path}: {error}") from None
        return _open[name]
