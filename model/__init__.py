"""The DeepSeek-V3 mixture of experts: `MoEConfig`, `MoEForCausalLM` and, apart from them, its balancing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import MoEConfig
    from model.transformer import MoEForCausalLM

__all__ = ["MoEConfig", "MoEForCausalLM"]


def __getattr__(name: str) -> Any:  # on demand: transformers takes seconds to import
    if name == "MoEConfig":
        from model.config import MoEConfig

        return MoEConfig
    if name == "MoEForCausalLM":
        from model.transformer import MoEForCausalLM

        return MoEForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
