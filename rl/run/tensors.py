"""Named tensors of any total size as a folder of safetensors files, written as they come and read by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 1 << 30  # a tensor that is larger stands alone


def write_tensors(folder: Path, named: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Holds no more than one file's tensors at a time."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    size = files = 0
    for name, tensor in named:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > file_bytes:
            save_file(held, folder / f"{files:05d}.safetensors")
            held, size, files = {}, 0, files + 1
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += bytes_
    if held:
        save_file(held, folder / f"{files:05d}.safetensors")


def read_tensors(folder: Path) -> Callable[[str], Any]:
    """name -> the tensor, not yet read: `[:]` or `[a:b]` reads it or some of its rows. (A scalar is read at once.)"""
    from safetensors import safe_open

    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle = safe_open(path, framework="pt")
        files.update(dict.fromkeys(handle.keys(), handle))

    def read(name: str) -> Any:
        lazy = files[name].get_slice(name)
        return lazy if lazy.get_shape() else files[name].get_tensor(name)

    return read
