"""What a recipe may say about problems: strict, frozen pydantic models without any behaviour."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data.errors import did_you_mean
from data.families import FAMILIES
from data.templates import TemplateSpec, resolve_template

Kind = Literal["integer", "math", "code"]


class Strict(BaseModel):
    """An unknown key or a value of the wrong type is an error, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GeneratorSpec(Strict):
    """Synthetic problems: `count` of them, drawn evenly from `families` x `levels` (see data/families.py)."""

    families: list[str] = Field(default_factory=lambda: list(FAMILIES), min_length=1)
    levels: list[Annotated[int, Field(ge=1, le=5)]] = Field(default=[1], min_length=1)
    count: int = Field(default=1000, ge=1)
    seed: int = 0
    # Solutions by a teacher who gets each column of a sum one too many with this probability: `answer` stays
    # the right one, `solution_answer` is what the working ends in. Only for the family `addition`.
    slips: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _only_addition_slips(self) -> "GeneratorSpec":
        if self.slips is not None and self.families != ["addition"]:
            raise ValueError("slips: only solutions of the family addition can have them; set families: [addition]")
        return self

    @field_validator("families")
    @classmethod
    def _known_families(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in FAMILIES:
                hint = did_you_mean(name, FAMILIES)
                raise ValueError(f"there is no family {name!r}; there are: {', '.join(FAMILIES)}. {hint}")
        return names


class Files(Strict):
    """Files here, or a data set of the hub."""

    path: str | list[str] | None = None  # .jsonl, .json, .parquet or .csv, by extension; globs work
    hub: str | None = None  # a data set id of the Hugging Face hub
    config: str | None = None  # of the hub data set
    revision: str | None = None  # of the hub data set
    split: str = "train"  # of the hub data set


class TextSpec(Files):
    """Where whole texts come from: exactly one of `path` and `hub`."""

    column: str = "text"
    min_tokens: int = Field(default=2, ge=2)  # shorter texts are left out, and counted
    limit: int | None = Field(default=None, ge=1)  # rows

    @model_validator(mode="after")
    def _one_source(self) -> "TextSpec":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self


class HeldOutSpec(Strict):
    """Which side of a split by the hash of the statement to load; the two sides never share a statement."""

    fraction: float = Field(gt=0, lt=1)  # the share that is held out
    part: Literal["train", "held_out"]
    salt: str = "r1forge"  # another salt, another split


class Location(Files):
    """Where rows come from and how to read them: exactly one of `path`, `hub` and `generator`."""

    generator: GeneratorSpec | None = None

    # Our name -> the source's column. A dot reaches into a nested column ("reward_model.ground_truth").
    # "auto" tries the usual names, as is done for prompt and answer when they are left out.
    columns: dict[str, str] = Field(default_factory=dict)
    # auto: gsm8k if every answer contains "####", else plain
    answer_format: Literal["auto", "plain", "gsm8k", "boxed"] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("path", "hub", "generator") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of path, hub and generator (given: {found})")
        for name in ("config", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"{name}: only a hub data set has one")
        return self


class ProblemSpec(Location):
    """Problems to train on or to be evaluated with."""

    kind: Kind | None = None  # None: row by row, "integer" if the answer is one, else "math"
    source: str | None = None  # None: the file's name, the hub id, or synthetic/<family>
    template: str | TemplateSpec = "plain"

    held_out: HeldOutSpec | None = None
    shuffle_seed: int | None = None  # None: the order of the source
    limit: int | None = Field(default=None, ge=1)  # taken last, after the split and the shuffle
    on_error: Literal["stop", "skip"] = "stop"  # what to do about a row without a prompt or an answer

    @field_validator("template")
    @classmethod
    def _known_template(cls, template: str | TemplateSpec) -> str | TemplateSpec:
        resolve_template(template)
        return template

    @model_validator(mode="after")
    def _given_once(self) -> Self:
        for name in ("kind", "source"):
            if getattr(self, name) is not None and name in self.columns:
                raise ValueError(f"{name}: given both as a value and as columns.{name}; keep one")
        return self
