"""Weights in pieces of bounded size, each a safetensors file in memory or on disk, with a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


class Damaged(ValueError):
    """A bucket is not what its checksum says, or an update is not complete."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def total_checksum(checksums: Iterable[str]) -> str:
    """Of a whole update: of its buckets' checksums, in order."""
    return checksum("".join(checksums).encode())


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def packed(named_tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """(names, safetensors bytes) of buckets of at most `limit` bytes of weights; a larger tensor is one of its own."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and size + bytes_ > limit:
            yield tuple(bucket), _serialised(bucket)
            bucket, size = {}, 0
        bucket[name] = tensor
        size += bytes_
    if bucket:
        yield tuple(bucket), _serialised(bucket)


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # Copies, as the format refuses tensors that share memory (views of a fused weight, tied embeddings).
    return save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})


@dataclass(frozen=True)
class StagedFile:
    """A bucket in a file, whose tensors are mapped one by one when they are read."""

    path: Path

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


@dataclass(frozen=True)
class StagedBytes:
    """A bucket in memory."""

    data: bytes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        from safetensors.torch import load

        yield from load(self.data).items()


Staged = StagedFile | StagedBytes


def staged_file(path: Path, expected: str) -> StagedFile:
    """Raises Damaged if the file is not there or differs."""
    try:
        found = file_checksum(path)
    except OSError as error:
        raise Damaged(f"the bucket file {path.name} cannot be read: {error.strerror}") from error
    if found != expected:
        raise Damaged(f"the bucket file {path.name} has checksum {found}, announced was {expected}")
    _check_format(StagedFile(path))
    return StagedFile(path)


def staged_bytes(data: bytes, expected: str) -> StagedBytes:
    found = checksum(data)
    if found != expected:
        raise Damaged(f"the bucket has checksum {found}, announced was {expected}")
    _check_format(StagedBytes(data))
    return StagedBytes(data)


def _check_format(staged: Staged) -> None:
    """Bytes with the right checksum that are no weights must not reach the engine either."""
    from safetensors import SafetensorError

    try:
        for _ in staged.tensors():
            break
    except SafetensorError as error:
        raise Damaged(f"the bucket is not in safetensors format: {error}") from error


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def as_tensor(data: bytes) -> Tensor:
    """The bytes as a uint8 tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
