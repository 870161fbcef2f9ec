"""What a recipe may say about curation: sources, filters, duplicates and evaluation sets."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data.errors import did_you_mean
from data.spec import Location, Strict

OnError = Literal["skip", "stop"]


class SourceSpec(Location):
    """One source of raw problems. Earlier ones win where several have the same problem."""

    name: str
    kind: Literal["math", "code"] = "math"
    adapter: str = "auto"  # how a raw row becomes a problem: see data/curation/adapters.py
    aime: bool = False  # answers must lie in 0..999
    keep: list[str] = Field(default_factory=list)  # further columns of the source to keep, as text
    limit: int | None = Field(default=None, ge=1)  # of rows, the first ones
    licence: str | None = None  # for the data card
    url: str | None = None  # for the data card

    @model_validator(mode="after")
    def _known_adapter(self) -> Self:
        from data.curation.adapters import ADAPTERS

        known = [name for name, adapter in ADAPTERS.items() if adapter.kind == self.kind]
        if self.adapter not in ("auto", *known):
            hint = did_you_mean(self.adapter, known)
            there = f"for kind {self.kind} there are: auto, {', '.join(known)}"
            raise ValueError(f"adapter: there is no {self.adapter!r}; {there}. {hint}")
        return self


class EvaluationSet(Location):
    """Problems that nothing may be trained on. Only their statements matter."""

    name: str
    kind: Literal["math", "code"] = "math"
    adapter: str = "auto"


class FilterSpec(Strict):
    residue: bool = True  # cut off hints, solvers' figures and signatures behind a statement
    choices: bool = True  # remove multiple-choice options, resolve letter answers
    integer_only: bool = True  # math answers become canonical integers; others are dropped


class DuplicateSpec(Strict):
    exact: bool = True  # the same statement after normalisation
    near: float | None = Field(
        default=0.8, gt=0, le=1
    )  # least Jaccard similarity of shingles; None: no near duplicates
    shingle: int = Field(default=3, ge=1)  # tokens


class ContaminationSpec(Strict):
    ngram: int = Field(default=13, ge=2)  # words
    # Least share of an evaluation statement's n-grams in a problem. One n-gram would be enough to find copies, but
    # contests share phrases that are longer ("can be written as m/n, where m and n are relatively prime ...").
    coverage: float = Field(default=0.5, gt=0, le=1)
    # Fewest tokens of a statement too short for n-grams that is looked for inside others. It must hold a number as
    # well: "What is the value of x?" stands in many problems.
    contained: int = Field(default=6, ge=1)
    sets: list[EvaluationSet] = Field(default_factory=list)
