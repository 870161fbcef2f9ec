"""A worker's side of an update: buckets are gathered and checked first, the engine changes only when all are right."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rl.rollout.workers.buckets import (
    Damaged,
    Staged,
    as_bytes,
    staged_bytes,
    staged_file,
    total_checksum,
)  # fmt: skip
from rl.rollout.workers.collective import Broadcast, BroadcastFailed
from rl.rollout.workers.loop import Conflict, EngineLoop
from rl.rollout.workers.wire import Begin, Bucket, Finish, Finished


def shared_folder() -> Path:
    """Memory that looks like a folder, where the system has it."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


class Update:
    """One update, from begin to finish. Until then it is held in memory, unless it lies in files."""

    def __init__(self, begin: Begin, folder: Path):
        self.version, self.transport, self.folder = begin.version, begin.transport, folder
        self.buckets: list[tuple[str, Staged]] = []
        self._broadcast: Broadcast | None = None
        if begin.transport == "collective":
            if begin.group is None:
                raise Damaged("transport collective needs a group to meet in")
            try:
                self._broadcast = Broadcast.join(**begin.group.model_dump())
            except BroadcastFailed as error:
                raise Conflict(str(error)) from error

    def add(self, note: Bucket, body: bytes | None) -> None:
        """Checks the next bucket; one that is sent again, after damage, replaces nothing that was right."""
        if note.version != self.version:
            raise Conflict(f"an update to version {self.version} is under way, not to {note.version}")
        if note.index < len(self.buckets) and self.buckets[note.index][0] == note.checksum:
            return  # sent twice, as the reply was lost
        if note.index != len(self.buckets):
            raise Conflict(f"bucket {len(self.buckets)} is next, not {note.index}")
        self.buckets.append((note.checksum, self._staged(note, body)))

    def _staged(self, note: Bucket, body: bytes | None) -> Staged:
        if self.transport == "files":
            if note.file is None:
                raise Damaged("transport files needs the name of a file")
            return staged_file(self.folder / note.file, note.checksum)
        if self.transport == "collective":
            return staged_bytes(self._received(note.bytes), note.checksum)
        if body is None:
            raise Damaged("transport http needs the bucket in the body")
        return staged_bytes(body, note.checksum)

    def _received(self, size: int) -> bytes:
        if self._broadcast is None:
            raise Conflict("the broadcast of this update has failed")
        try:
            return as_bytes(self._broadcast.receive(size))
        except BroadcastFailed as error:
            self._broadcast.close()
            self._broadcast = None
            raise Conflict(str(error)) from error

    def check(self, finish: Finish) -> None:
        if finish.version != self.version:
            raise Conflict(f"an update to version {self.version} is under way, not to {finish.version}")
        if finish.buckets != len(self.buckets):
            raise Damaged(f"{finish.buckets} buckets were sent, {len(self.buckets)} arrived")
        if finish.checksum != total_checksum(checksum for checksum, _ in self.buckets):
            raise Damaged("the checksum of the whole update does not fit")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for _, staged in self.buckets:
            yield from staged.tensors()


class Updates:
    """The update under way, if there is one."""

    def __init__(self, loop: EngineLoop, folder: Path):
        self.loop, self.folder = loop, folder
        self._current: Update | None = None
        self._finished: Finished | None = None  # the last one, if nothing was begun after it
        self._failed: tuple[int, type[Exception], str] | None = None  # likewise: its version, and why
        self._lock = threading.Lock()

    def begin(self, message: Begin) -> None:
        """A new update takes the place of one that was never finished."""
        with self._lock:
            self._current = self._finished = self._failed = None
            self._current = Update(message, self.folder)

    def bucket(self, note: Bucket, body: bytes | None) -> None:
        with self._lock:
            self._under_way().add(note, body)

    def finish(self, message: Finish) -> Finished:
        """Hands the weights to the engine."""
        with self._lock:
            if self._finished is not None and self._finished.version == message.version:
                return self._finished  # asked again, as the reply was lost
            if self._failed is not None and self._failed[0] == message.version:
                _, kind, reason = self._failed
                raise kind(reason)
            update = self._under_way()
            update.check(message)
            self._current = None  # whatever becomes of it, it is not finished twice
            try:
                scores = self.loop.update(update.tensors(), update.version, message.in_flight, message.probe)
            except Exception as error:
                self._failed = (update.version, *_reason(error))
                raise
            self._finished = Finished(version=self.loop.engine.version, logprobs=scores)
            return self._finished

    def _under_way(self) -> Update:
        if self._current is None:
            raise Conflict("no update is under way: begin one")
        return self._current


def _reason(error: Exception) -> tuple[type[Exception], str]:
    """What to raise again. The error itself would keep its frames alive, and with them the weights."""
    if isinstance(error, Conflict | Damaged):
        return type(error), str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"
