"""Broadcasts between the trainer's first process and the workers, in a group of their own.

The trainer's default process group knows nothing of the workers, and a worker may have a default group that belongs to
its engine. So the group is made by hand from a store, for one update, and dropped with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]


class BroadcastFailed(RuntimeError):
    """Somebody is missing or was lost, and these weights have to come another way. No engine has a part in it."""


def open_store(host: str, timeout_s: float) -> TCPStore:
    """The meeting point, on the sender's side; its `port` is chosen by the system."""
    return TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


class Broadcast:
    """`backend` gloo for CPU tensors, nccl for those of the current GPU; rank 0 sends.

    Making one waits for the others. All of it raises BroadcastFailed when somebody is missing for longer than
    `timeout_s`, or is lost.
    """

    def __init__(self, store: Store, rank: int, world: int, backend: str, timeout_s: float):
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        timeout = timedelta(seconds=timeout_s)
        self._group: Any
        with _together("the group for the broadcast did not come together"):
            if backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, rank, world, options)
            else:
                self._group = dist.ProcessGroupGloo(store, rank, world, timeout)

    @classmethod
    def join(cls, host: str, port: int, rank: int, world: int, backend: str, timeout_s: float) -> Broadcast:
        with _together("the sender of the broadcast cannot be reached"):
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        return cls(store, rank, world, backend, timeout_s)

    def send(self, bytes_T: Tensor) -> None:
        """uint8 [T] to everybody else."""
        self._broadcast(bytes_T.to(self.device))

    def receive(self, size: int) -> Tensor:
        """The uint8 [size] that rank 0 sends."""
        bytes_T = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._broadcast(bytes_T)
        return bytes_T

    def close(self) -> None:
        """Ends the connections. Who waits for this process hears of it at once, and not after the timeout."""
        self._group = None

    def _broadcast(self, bytes_T: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with _together("the broadcast failed"):
            self._group.broadcast([bytes_T], options).wait()
            if self.device.type == "cuda":
                torch.cuda.synchronize()


@contextmanager
def _together(failure: str) -> Iterator[None]:
    """torch raises RuntimeError, or one of its kinds, for whatever comes between processes."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BroadcastFailed(f"{failure}: {lines[0][:200]}") from error
