"""What an engine is told that follows from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import grpo
from rl.recipe_io import validate
from rl.rollout import make
from rl.rollout.probe import probe_tokens


@pytest.mark.parametrize(("max_prompt_tokens", "longest"), [(20, 65), (52, 65), (53, 65), (54, 66)])
def test_vllm_has_room_for_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_prompt_tokens: int, longest: int
) -> None:
    """Though rollouts be shorter; scoring it takes one token more."""
    assert len(probe_tokens(100)) == 64
    for mode, workers in (("server", {"count": 1}), ("colocate", None)):
        rollout = {"engine": "vllm", "mode": mode, "max_prompt_tokens": max_prompt_tokens, "max_tokens": 12}
        recipe: Any = validate(grpo(tmp_path, rollout={**rollout, "workers": workers}))
        assert make._options(recipe, False, 0)["max_model_len"] == longest
