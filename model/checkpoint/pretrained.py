"""The steps of `from_pretrained` and `save_pretrained` that the released layout needs done its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from model.checkpoint.files import Checkpoint, CheckpointError
from model.checkpoint.load import fill
from model.checkpoint.names import HEAD, module_copies, needed, released


class ReleasedLayout(PreTrainedModel):
    """Loads strictly, tensor by tensor, FP8 too; saves what other engines load."""

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[LoadStateDictInfo, Any]:
        """transformers has found the files and built the model without memory; it ties weights and computes buffers
        afterwards. Values given as a dict, and what `fill` cannot place (weights on disk, sharded or quantised ones),
        go transformers' way, which is not strict."""
        if checkpoint_files is not None:
            if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
                raise CheckpointError(f"{checkpoint_files[0]}: only safetensors files are read")
            checkpoint = Checkpoint([Path(file) for file in checkpoint_files])
            devices = load_config.device_map or {"": "cpu"}
            obstacle = _obstacle(model, devices, load_config)
            if obstacle is None:
                fill(model, checkpoint, lambda name: devices[_longest_prefix(name, devices)])
                return _complete(tied=model.config.tie_word_embeddings), None
            if checkpoint.fp8:
                raise CheckpointError(
                    f"{checkpoint.folder}: FP8 files are not read with {obstacle}: dequantise them first "
                    "(python -m model.checkpoint dequantise)"
                )
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        repeat_shared: bool = True,
        **kwargs: Any,
    ) -> None:
        """As any PreTrainedModel, but config.json names the architecture that transformers and vLLM know.

        repeat_shared: prediction modules get copies of the embedding and the head that they share, as in the release:
            vLLM and SGLang load them from there. (Not if weights are offloaded or sharded.)
        """
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        # Offloaded and sharded weights are gathered by name: they stay as they are.
        if all(type(tensor) is Tensor and not tensor.is_meta for tensor in state_dict.values()):
            # transformers would split stacked experts too, but keep a stack in one file, however large.
            named = needed(released(state_dict), self.config)
            repeated = module_copies(self.config) if repeat_shared else {}
            state_dict = {name: t if name in state_dict else _alone(t) for name, t in named.items()}
            state_dict.update({copy: state_dict[main].clone() for copy, main in repeated.items()})
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if is_main_process:
            self.config.architectures = [self.config.architecture]
            self.config.save_pretrained(save_directory)


def _alone(view: Tensor) -> Tensor:
    """The same memory under a storage of its own, so that nobody takes it for a part of something larger."""
    return from_dlpack(view.detach())


def _obstacle(model: Any, devices: dict[str, Any], load_config: Any) -> str | None:
    if load_config.hf_quantizer is not None:
        return "a quantization_config"
    if load_config.device_mesh is not None:
        return "a device mesh"
    if "disk" in devices.values():
        return "weights on disk"
    if not all(tensor.is_meta for tensor in model.state_dict().values()):  # DeepSpeed ZeRO-3 builds it so
        return "a model that has memory already"
    return None


def _longest_prefix(name: str, devices: dict[str, Any]) -> str:
    """The entry of a device map that a tensor belongs to."""
    return max((p for p in devices if p == "" or name == p or name.startswith(p + ".")), key=len)


def _complete(tied: bool) -> LoadStateDictInfo:
    """Everything is there; a tied head is still to be tied."""
    return LoadStateDictInfo(
        missing_keys={HEAD} if tied else set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
