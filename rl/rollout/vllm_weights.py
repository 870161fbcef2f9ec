"""New weights for a running vLLM: what is checked on the way in, and what its workers execute.

vLLM reloads a layer when all tensors of that layer have come, and it fuses several of a checkpoint's tensors into one
layer (q, k and v; all experts). A layer of which only a part came is finished with uninitialised memory, without a
word; a name that it does not know ends the reload half-way. So names and shapes are compared with the checkpoint's
as they pass, and an update that leaves a layer incomplete is an error.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rl.rollout.workers.buckets import StagedFile, packed

SPOOL_BYTES = 1 << 30  # a file's size on the way to workers in other processes


class WeightsExtension:
    """Mixed into vLLM's workers (`worker_extension_cls`): runs where the weights are."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any

    def r1forge_load(self, source: Iterable[tuple[str, Tensor]] | str) -> None:
        """From an iterator in this process, or a folder of safetensors files."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # It warns of rotary tables and tied heads, which no checkpoint has; what is missing is known from `checked`.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        named = spooled_tensors(source) if isinstance(source, str) else source
        model = self.model_runner.get_model()
        try:
            self.reload_weights(weights_iterator=named)
        except BaseException:
            # Takes the layers out of their half-loaded state, so that a whole update can follow.
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            raise
        repack_tied_head(model)

    def r1forge_fused(self) -> dict[str, list[str]]:
        """Which of a checkpoint's modules vLLM makes one of: {"qkv_proj": ["q_proj", ...], ...}."""
        return dict(getattr(self.model_runner.get_model(), "packed_modules_mapping", None) or {})


def repack_tied_head(model: Any) -> None:
    """On CPU vLLM multiplies by a packed copy of each weight. A head that is tied to the embedding is no layer of its
    own to a reload, and keeps the copy of the old embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def checkpoint_shapes(model_path: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, from the headers of its files; empty if it has no safetensors files."""
    from safetensors import safe_open

    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model_path, local_files_only=True, allow_patterns=["*.safetensors"]))
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def unread(names: Iterable[str], layers: int) -> set[str]:
    """Those of a checkpoint that vLLM's models pass over: what is computed anew, and prediction modules, which stand
    behind the `layers` of the model. A trainer need not have them."""

    def behind(name: str) -> bool:
        number = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
        return number is not None and int(number[1]) >= layers

    return {n for n in names if n.endswith("rotary_emb.inv_freq") or n.startswith(("mtp.", "model.mtp.")) or behind(n)}


def fused_module(name: str, fused: Mapping[str, Sequence[str]]) -> str:
    """The module of vLLM's that keeps a checkpoint's tensor."""
    path = name.split(".")[:-1]
    if "experts" in path:
        return ".".join(path[: path.index("experts") + 1])
    if path:
        path[-1] = next((whole for whole, parts in fused.items() if path[-1] in parts), path[-1])
    return ".".join(path)


def together(names: Iterable[str], known: Iterable[str], fused: Mapping[str, Sequence[str]]) -> set[str]:
    """The names that an update of `names` must carry: all of the modules that they are part of."""
    touched = {fused_module(name, fused) for name in names}
    return {name for name in known if fused_module(name, fused) in touched}


def checked(
    named_tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    fused: Mapping[str, Sequence[str]],
    *,
    tied: bool,
    whole: bool,
    unread: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. KeyError: unknown name; ValueError: wrong shape, or (at the end) tensors that are missing.

    shapes: the checkpoint's; if empty nothing is checked. tied: the head is the embedding, and not loaded by its own
    name. whole: all of the checkpoint must come but for `unread`, not just some whole layers.
    """
    sent: set[str] = set()
    for name, tensor in named_tensors:
        if shapes and name not in shapes:
            if tied and name == "lm_head.weight":
                continue
            raise KeyError(f"the sampler's model has no weight named {name!r}")
        if shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shapes[name]}")
        if name in sent:  # vLLM keeps the first, without a word
            raise ValueError(f"{name} was sent twice in one update")
        sent.add(name)
        yield name, tensor
    needed = set(shapes) if whole else together(sent, shapes, fused)
    missing = sorted(needed - sent - set(unread) - ({"lm_head.weight"} if tied else set()))
    if missing:
        listed = f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} ({len(missing)} tensors)"
        why = (
            "vLLM was started empty, or an update broke off, so all weights of its folder must come (an engine with "
            "`empty: false` loads those that never do)"
            if whole
            else "vLLM needs all tensors of a layer together (q, k and v; gate and up; all experts)"
        )
        raise ValueError(f"the update lacks {listed}: {why}")


@contextmanager
def spooled(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """A folder with the tensors, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="r1forge-weights-", dir=memory if memory.is_dir() else None) as folder:
        for number, (_, data) in enumerate(packed(named_tensors, SPOOL_BYTES)):
            Path(folder, f"{number:06d}.safetensors").write_bytes(data)
        yield folder


def spooled_tensors(folder: str) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(Path(folder).glob("*.safetensors")):
        yield from StagedFile(path).tensors()
