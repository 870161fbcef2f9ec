"""Sending weights: written once to a spool, from there to every worker, and again to one that was restarted.

The spool keeps what workers need to come to the current version from wherever they start. So a restart asks nothing of
the trainer, whose weights may be spread over processes that are doing something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rl.rollout.workers.buckets import as_tensor, checksum, packed, staged_file, total_checksum
from rl.rollout.workers.client import Refusal, Unreachable, WorkerClient
from rl.rollout.workers.collective import Broadcast, BroadcastFailed, open_store
from rl.rollout.workers.wire import Begin, Bucket, Finish, Group, Transport

PREFIX = "r1forge-weights-"
DAMAGED = 422


class TransferError(RuntimeError):
    """A worker will not take these weights, however often they are sent."""


@dataclass(frozen=True)
class Spooled:
    """A bucket on disk or in shared memory."""

    path: Path
    names: frozenset[str]
    size: int
    checksum: str


class Spool:
    """The newest value of every weight that was ever sent, and no other, in buckets of at most `limit` bytes.

    A worker that comes back is sent all of it, and an engine may take a weight only once in an update.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = _own_folder(folder), limit
        self.buckets: list[Spooled] = []
        self._written = 0
        self._remove()  # what a run that was killed has left

    def write(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Spooled]:
        """Each bucket as it is written. At the end, older buckets lose the weights that have been sent anew."""
        fresh: list[Spooled] = []
        for names, data in packed(named_tensors, self.limit):
            fresh.append(self._put(names, data))
            yield fresh[-1]
        new = frozenset[str]().union(*(bucket.names for bucket in fresh))
        self.buckets = [kept for bucket in self.buckets for kept in self._without(bucket, new)] + fresh

    def _put(self, names: Iterable[str], data: bytes) -> Spooled:
        self._written += 1
        path = self.folder / f"{PREFIX}{self._written:08d}.safetensors"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        return Spooled(path, frozenset(names), len(data), checksum(data))

    def _without(self, bucket: Spooled, new: frozenset[str]) -> list[Spooled]:
        """What is left of an old bucket, written anew if that is a part of it.

        As later updates bring the same weights again, hardly any bucket is rewritten twice.
        """
        left = bucket.names - new
        if left == bucket.names:
            return [bucket]
        kept = []
        if left:  # read with its checksum: a damaged file must not get a new one
            tensors = staged_file(bucket.path, bucket.checksum).tensors()
            kept = [self._put(*part) for part in packed((pair for pair in tensors if pair[0] in left), self.limit)]
        bucket.path.unlink(missing_ok=True)
        return kept

    def close(self) -> None:
        self._remove()
        self.buckets = []
        try:
            self.folder.rmdir()
        except OSError:
            pass  # somebody else's files are in there

    def _remove(self) -> None:
        for path in self.folder.glob(f"{PREFIX}*.safetensors"):
            path.unlink(missing_ok=True)


def _own_folder(folder: Path) -> Path:
    """Made if it is not there. Shared memory is open to all users: one of somebody else's making is refused."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: give another one as workers.folder")
    return folder


class Transmission:
    """One update to several workers at once. A worker that does not answer is left out, and `lost` says why."""

    def __init__(
        self,
        clients: Sequence[WorkerClient],
        version: int,
        transport: Transport,
        *,
        host: str = "127.0.0.1",
        backend: str = "gloo",
    ):
        self.version, self.transport = version, transport
        self.live = list(clients)
        self.lost: dict[str, str] = {}
        self.scores: dict[str, list[list[float]]] = {}  # of the probe, by those that acknowledged
        self.bytes = 0
        self._checksums: list[str] = []
        self._threads = ThreadPoolExecutor(max(1, len(self.live)), thread_name_prefix="weights")
        self._broadcast: Broadcast | None = None
        if transport == "collective":
            self._meet(host, backend)
        else:
            self._each(lambda client: client.begin(Begin(version=version, transport=transport)))

    def send(self, bucket: Spooled) -> None:
        """To everybody who is left; a worker that received it damaged gets it once more."""
        if not self.live:
            return
        by_file = self.transport == "files"
        note = Bucket(
            version=self.version,
            index=len(self._checksums),
            bytes=bucket.size,
            checksum=bucket.checksum,
            file=bucket.path.name if by_file else None,
        )
        self._checksums.append(bucket.checksum)
        self.bytes += bucket.size
        if self._broadcast is not None:
            self._send_collectively(note, bucket.path.read_bytes())
            return
        body = None if by_file else bucket.path.read_bytes()

        def twice(client: WorkerClient) -> None:
            try:
                client.bucket(note, body)
            except Refusal as error:
                if error.status != DAMAGED:
                    raise
                client.bucket(note, body)

        self._each(twice)

    def finish(self, *, in_flight: bool = False, probe: Sequence[Sequence[int]] = ()) -> list[WorkerClient]:
        """The workers that have acknowledged the version, whose weights are now the new ones.

        in_flight: they need not wait for the end of what they are sampling. probe: what each scores with the weights.
        """
        message = Finish(
            version=self.version,
            buckets=len(self._checksums),
            checksum=total_checksum(self._checksums),
            in_flight=in_flight,
            probe=[list(tokens) for tokens in probe],
        )

        def acknowledged(client: WorkerClient) -> None:
            reply = client.finish(message)
            if reply.version != self.version or len(reply.logprobs) != len(message.probe):
                raise Unreachable(
                    f"it acknowledged version {reply.version} with {len(reply.logprobs)} scores of the probe, not "
                    f"{self.version} with {len(message.probe)}"
                )
            self.scores[client.url] = reply.logprobs

        self._each(acknowledged)
        self._threads.shutdown()
        return self.live

    def _each(self, call: Callable[[WorkerClient], None], meanwhile: Callable[[], None] | None = None) -> None:
        """The call for every worker at the same time. TransferError if one that is left says that it never will."""
        futures = {client: self._threads.submit(call, client) for client in self.live}
        if meanwhile is not None:
            meanwhile()
        for client, future in futures.items():
            try:
                future.result()
            except Unreachable as error:
                self._lose(client, str(error))
            except Refusal as error:
                if error.status >= 500 and client in self.live:
                    raise TransferError(
                        f"worker {client.url} refused the weights of version {self.version}: {error}"
                    ) from error
                self._lose(client, str(error))

    def _lose(self, client: WorkerClient, reason: str) -> None:
        if client in self.live:
            self.live.remove(client)
            self.lost[client.url] = reason

    # ---- collective -----------------------------------------------------------------------------------

    def _meet(self, host: str, backend: str) -> None:
        if not self.live:
            return
        timeout_s = self.live[0].deadline_s
        store = open_store(host, timeout_s)
        world = len(self.live) + 1
        ranks = {client.url: rank for rank, client in enumerate(self.live, start=1)}

        def begin(client: WorkerClient) -> None:
            group = Group(
                host=host, port=store.port, rank=ranks[client.url], world=world, backend=backend,  # type: ignore[arg-type]
                timeout_s=timeout_s,
            )  # fmt: skip
            client.begin(Begin(version=self.version, transport="collective", group=group))

        def join() -> None:
            try:
                self._broadcast = Broadcast(store, 0, world, backend, timeout_s)
            except BroadcastFailed as error:
                self._lose_all(str(error))

        self._each(begin, join)
        self._all_or_none()

    def _send_collectively(self, note: Bucket, data: bytes) -> None:
        broadcast = self._broadcast
        assert broadcast is not None

        def send() -> None:
            try:
                broadcast.send(as_tensor(data))
            except BroadcastFailed as error:
                broadcast.close()
                self._lose_all(str(error))

        self._each(lambda client: client.bucket(note), send)
        self._all_or_none()

    def _all_or_none(self) -> None:
        """A broadcast goes through those that take part in it, so none is begun in which one would be missing. All get
        the weights one by one afterwards."""
        if self.lost:
            self._lose_all(f"the broadcast cannot go on without {', '.join(self.lost)}")

    def _lose_all(self, reason: str) -> None:
        for client in list(self.live):
            self._lose(client, reason)
