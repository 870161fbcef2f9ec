"""The kinds of answers that the parser tells apart. A scalar is a sympy expression, a matrix a sympy matrix."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy


@dataclass(frozen=True, slots=True)
class Text:
    """Prose: equal only to the same words."""

    words: str


@dataclass(frozen=True, slots=True)
class Bracketed:
    """`(1, 2)`, `[0, 1)`, `⟨1, 2⟩`: an ordered tuple, or an interval where the other side is one."""

    items: tuple["Value", ...]
    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Values without brackets: `1, 2`, `x < 1 or x > 3`. Unordered, except against a tuple."""

    items: tuple["Value", ...]
    joiner: Literal[",", "and", "or"] = ","


@dataclass(frozen=True, slots=True)
class Braces:
    r"""A finite set, `\\{1, 2\\}`."""

    items: tuple["Value", ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers built from intervals and finite sets."""

    numbers: sympy.Set


@dataclass(frozen=True, slots=True)
class Ratio:
    """`7:32`, also a time of day: `written` keeps the digits."""

    items: tuple[sympy.Expr, ...]
    written: str


@dataclass(frozen=True, slots=True)
class Residue:
    """`3 (mod 5)`."""

    value: sympy.Expr
    modulus: sympy.Expr


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain such as `1 < x <= 3` or `f(x) = x + 1`.

    names[i]: the name that side i is (`x`, `f`, `AB`), or None where it is something to compute.
    plain[i]: side i is a number as written (`7`), with nothing to compute (`3 + 4`).
    sides[i]: None where a side has a name but no value (`\\angle ABC`).
    """

    sides: tuple["Value | None", ...]
    operators: tuple[str, ...]
    names: tuple[str | None, ...]
    plain: tuple[bool, ...]


Value: TypeAlias = (
    sympy.Expr | sympy.MatrixBase | Text | Bracketed | Listing | Braces | Region | Ratio | Residue | Relation
)
