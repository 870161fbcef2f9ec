"""The recipe entry that names a reward. Kept apart because importing pydantic is slow."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardSpec(BaseModel):
    """One entry of a recipe's `rewards:` list.

    Exactly one of `name` (a built-in or an entry point of group "r1forge.rewards") and `path`
    ("file.py:function" or "package.module:function"). `args` are bound as keyword arguments. `per_group` says that it
    looks at nothing outside a group; None = true of built-in ones.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str | None = None
    path: str | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)
    args: dict[str, Any] = Field(default_factory=dict)
    per_group: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of 'name' and 'path'")
        return self
