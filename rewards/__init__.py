"""Rewards: verifiers and plug-ins that turn each completion into one number.

A reward is a function in TRL's convention, `fn(prompts, completions, completion_ids, **columns)`, that
returns a float per completion, or None where it does not apply. See `registry` for how one is named in a
recipe, `compose` for how several are summed, and `rewards.math` for the answer verifier.
"""

from typing import TYPE_CHECKING, Any

from .compose import Scores, score
from .errors import RewardError
from .registry import Reward, available_rewards, load_reward

if TYPE_CHECKING:
    from .spec import RewardSpec

__all__ = ["Reward", "RewardError", "RewardSpec", "Scores", "available_rewards", "load_reward", "score"]


def __getattr__(name: str) -> Any:
    if name == "RewardSpec":  # on demand: pydantic takes longer to import than everything else here
        from .spec import RewardSpec

        return RewardSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
