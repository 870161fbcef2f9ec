"""What a recipe may say about traces: where existing ones come from, and which of them are kept."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from data.errors import did_you_mean
from data.spec import Files, ProblemSpec, Strict

Adapter = Literal["table", "messages", "openr1", "openthoughts", "gsm8k", "odyssey", "reasoning-gym", "traces"]
TABLE_COLUMNS = ("id", "prompt", "completion", "thinking", "gold", "kind", "teacher", "finish_reason")


class TraceSource(Files):
    """Existing traces: exactly one of `path` and `hub`."""

    adapter: Adapter = "table"  # the shape of a row, see data/trace_import.py
    columns: dict[str, str] = Field(default_factory=dict)  # `table` only: our name -> the source's column
    # With `data`: the problems' column that equals a trace's id; None: the same statement, up to typesetting.
    join: str | None = None
    teacher: str | None = None  # None: as the source says
    limit: int | None = Field(default=None, ge=1)  # rows of the source, the first ones

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in TABLE_COLUMNS:
                hint = did_you_mean(name, TABLE_COLUMNS)
                raise ValueError(f"there is no column {name!r} to map; there are {', '.join(TABLE_COLUMNS)}. {hint}")
        return columns

    @model_validator(mode="after")
    def _consistent(self) -> "TraceSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        for name in ("config", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"{name}: only a hub data set has one")
        if self.columns and self.adapter != "table":
            raise ValueError(f"columns: the adapter {self.adapter} knows its columns; drop it, or set adapter: table")
        return self

    def rows(self) -> ProblemSpec:
        """As `data.sources` reads the rows of a source."""
        return ProblemSpec(path=self.path, hub=self.hub, config=self.config, revision=self.revision, split=self.split)


class SelectSpec(Strict):
    """Filters in the order in which they are applied; the defaults are those of R1's rejection sampling
    (arXiv 2501.12948, section 2.3.3): right answers only, no mixed languages, long paragraphs or code blocks."""

    finished: bool = True  # the teacher stopped by itself
    reasoning: bool = True  # there is some
    min_reward: float | None = 1.0  # None: unverified traces are kept too
    language: str | None = "en"  # ISO 639-1 code of the language to think in; None: any
    min_language_share: float = Field(default=0.95, ge=0, le=1)  # of the words of the reasoning, by script
    code_blocks: bool = False  # whether the reasoning may hold fenced code
    max_paragraph: int | None = Field(default=4000, ge=1)  # characters between two blank lines of the reasoning
    # Share of the reasoning's 20-grams (of words, numbers and signs) that stood in it before.
    max_repetition: float | None = Field(default=0.3, ge=0, le=1)
    min_tokens: int = Field(default=0, ge=0)  # of reasoning and answer together
    max_tokens: int | None = Field(default=None, ge=1)
    # Among the traces of a problem, reasoning that shares more than this of its 5-grams with a preferred one.
    max_similarity: float | None = Field(default=0.8, ge=0, le=1)
    per_problem: int | None = Field(default=None, ge=1)  # traces kept of a problem; None: all
    prefer: Literal["shortest", "random", "diverse"] = "random"

    @model_validator(mode="after")
    def _bounds(self) -> "SelectSpec":
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens ({self.max_tokens}) is below min_tokens ({self.min_tokens})")
        return self
