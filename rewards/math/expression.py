r"""Recursive descent from tokens to sympy objects, for one expression. Nothing is evaluated as code.

    expression := term (("+" | "-") term)*
    term       := power (("*" | "/" | nothing) power)*
    power      := atom ("!" | "%" | "'" | "^" exponent | degree)*
    atom       := number | name | bracket | |expression| | \command arguments | matrix

Sizes are bounded by `bounded`, nesting by MAX_DEPTH.
"""

from collections.abc import Callable

import sympy

from . import bounded
from .cursor import PAIRS, Cursor, opens, split
from .operations import (
    BASES,
    DEGREE,
    INVERSES,
    add,
    apply,
    based,
    determinant,
    matrix_power,
    multiply,
    only,
    refuse,
    scalar,
    several,
)
from .tokens import FUNCTIONS, Token, Unreadable
from .values import Bracketed, Region, Value

MAX_DEPTH = 40

Inner = Callable[[list[Token], int], Value]

_CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo}
_SETS = {"R": sympy.Reals, "Z": sympy.Integers, "N": sympy.Naturals, "Q": sympy.Rationals, "C": sympy.Complexes,
         "emptyset": sympy.EmptySet}  # fmt: skip
GREEK = frozenset(
    """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell""".split()
)
# Letters that are read as functions before a parenthesis: f(x), but n(n + 1) is a product.
_FUNCTION_LETTERS = frozenset("fghFGHW")
_FOLDS = {"sum": sympy.Add, "prod": sympy.Mul}


def symbol(name: str) -> sympy.Symbol:
    """Variables are real: sqrt(x^2) is |x|."""
    return sympy.Symbol(name, real=True)


class Expression(Cursor):
    """One pass over the tokens of one expression. `inner` reads what stands inside brackets."""

    def __init__(self, tokens: list[Token], inner: Inner, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        super().__init__(tokens)
        self.inner, self.depth = inner, depth
        self.bars = 0

    def parse(self) -> Value:
        value = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(f"unexpected {self.tokens[self.at].text!r}")
        return value

    def sub(self, tokens: list[Token]) -> Value:
        return self.inner(tokens, self.depth + 1)

    def braced(self) -> Value:
        r"""The argument of a command: a group, or a single token (`\frac12`)."""
        if self.sees("{"):
            return self.sub(self.group()[1])
        token = self.take()
        if token.kind == "number" and len(token.text) > 1:
            self.at -= 1
            self.tokens[self.at] = Token("number", token.text[1:], False)
            return sympy.Integer(token.text[0])
        if token.kind in ("number", "letter"):
            return self.sub([token])
        self.at -= 1
        return self.atom()

    def scalar_argument(self) -> sympy.Expr:
        return scalar(self.braced())

    # -- grammar -----------------------------------------------------------------------------------

    def sum(self) -> Value:
        value = self.signed_term()
        while self.sees("+", "-"):
            negative = self.take().text == "-"
            value = add(value, self.signed_term(), negative)
        return value

    def signed_term(self) -> Value:
        negative = False
        signs = 0
        while self.sees("+", "-"):
            negative ^= self.take().text == "-"
            signs += 1
            if signs > 2:
                raise Unreadable("many signs")
        value = self.term()
        return multiply(sympy.Integer(-1), value) if negative else value

    def term(self) -> Value:
        value = self.power()
        while True:
            if self.accept("*", "times", "cdot"):
                value = multiply(value, self.signed_power())
            elif self.accept("/", "div"):
                value = bounded.quotient(scalar(value), scalar(self.signed_power()))
            elif self.accept("mod"):
                modulus = scalar(self.signed_power())
                value = sympy.Mod(scalar(value), modulus) if modulus.is_nonzero else refuse("mod 0")
            elif self.begins_factor() or self.follows_factorial():
                value = multiply(value, self.power())
            else:
                return value

    def follows_factorial(self) -> bool:
        """3!7! is a product, although 3 7 is not."""
        token = self.peek()
        return token is not None and token.kind == "number" and self.at > 0 and self.tokens[self.at - 1].text == "!"

    def signed_power(self) -> Value:
        if self.accept("-"):
            return multiply(sympy.Integer(-1), self.power())
        self.accept("+")
        return self.power()

    def begins_factor(self) -> bool:
        token = self.peek()
        if token is None or token.kind in ("number", "text", "end"):
            return False
        if token.kind in ("letter", "begin"):
            return True
        if token.text == "|":
            return self.bars == 0
        return token.text in ("(", "{", "[", "langle", "lfloor", "lceil") or (
            token.kind == "command"
            and (token.text in FUNCTIONS or token.text in GREEK or token.text in _CONSTANTS or token.text == "frac")
        )

    def power(self) -> Value:
        value = self.atom()
        while True:
            if self.accept("!"):
                double = self.accept("!")
                value = (bounded.double_factorial if double else bounded.factorial)(scalar(value))
            elif self.accept("%"):
                # At the end a unit, like a degree; inside an expression a hundredth.
                if self.peek() is not None:
                    value = bounded.quotient(scalar(value), sympy.Integer(100))
            elif self.accept("degree"):
                value = multiply(value, DEGREE)
            elif self.accept("^"):
                value = self.raised(value)
            else:
                return value

    def raised(self, base: Value) -> Value:
        if self.sees("degree"):
            return base
        if self.sees("{") and [token.text for token in self.tokens[self.at + 1 : self.at + 3]] == ["degree", "}"]:
            self.at += 3
            return multiply(base, DEGREE)
        exponent = self.exponent()
        if isinstance(base, sympy.MatrixBase):
            return matrix_power(base, exponent)
        return bounded.power(scalar(base), exponent)

    def exponent(self) -> sympy.Expr:
        if self.sees("{"):
            return self.scalar_argument()
        negative = self.accept("-")
        value = scalar(self.atom())
        if self.accept("^"):  # a tower of plain mathematics: 2^3^4
            value = bounded.power(value, self.exponent())
        return -value if negative else value

    def atom(self) -> Value:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "letter":
            return self.named(token.text)
        if token.kind == "begin":
            self.at -= 1
            return self.matrix()
        if token.kind == "symbol" and token.text == "|" and self.bars == 0:
            return self.between_bars()
        if opens(token):
            self.at -= 1
            return self.bracket()
        if token.kind == "command":
            return self.command(token.text)
        raise Unreadable(f"unexpected {token.text!r}")

    def number(self, token: Token) -> Value:
        value = sympy.Rational(token.text)
        if self.accept("_"):
            return based(token.text, self.base())
        if value.is_Integer and self.sees("frac"):
            start = self.at
            fraction = scalar(self.atom())
            plain = all(
                part.kind in ("number", "command") or part.text in "{}" for part in self.tokens[start : self.at]
            )
            if plain and fraction.is_Rational and 0 < fraction < 1:
                return value + fraction
            self.at = start
        return value

    def base(self) -> sympy.Expr:
        """What stands below a number: `2`, `{16}`, `\\text{two}`."""
        tokens = self.group()[1] if self.sees("{") else [self.take()]
        if len(tokens) == 1 and tokens[0].kind == "text":
            return BASES.get(tokens[0].text.casefold(), sympy.Integer(0))
        return scalar(self.sub(tokens))

    def named(self, name: str) -> Value:
        name += self.subscript()
        if name == "e":
            return sympy.E
        if name == "i":
            return sympy.I
        token = self.peek()
        if name[0] in _FUNCTION_LETTERS and token is not None and token.text == "(" and not token.spaced:
            inside = self.sub(self.group()[1])
            return sympy.Function(name)(*(scalar(item) for item in several(inside)))
        return symbol(name)

    def subscript(self) -> str:
        name = ""
        while self.sees("_", "'"):
            if self.take().text == "'":
                name += "'"
                continue
            tokens = self.group()[1] if self.sees("{") else [self.take()]
            name += "_" + "".join(token.text for token in tokens)
        return name

    def between_bars(self) -> Value:
        self.bars += 1
        inside = self.sum()
        self.bars -= 1
        if not self.accept("|"):
            raise Unreadable("a bar is not closed")
        if isinstance(inside, sympy.MatrixBase):
            return determinant(inside)
        return sympy.Abs(scalar(inside))

    def bracket(self) -> Value:
        bars, self.bars = self.bars, 0
        opening, tokens, closing = self.group()
        self.bars = bars
        if closing not in PAIRS[opening]:
            raise Unreadable("brackets do not match")
        if opening in ("lfloor", "lceil"):
            return (sympy.floor if opening == "lfloor" else sympy.ceiling)(scalar(self.sub(tokens)))
        if len(tokens) == 1 and tokens[0].kind == "number" and self.accept("_"):  # (1011)_2
            return based(tokens[0].text, self.base())
        return self.sub([Token("symbol", opening, False), *tokens, Token("symbol", closing, False)])

    def command(self, name: str) -> Value:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _SETS:
            return Region(_SETS[name])
        if name in GREEK:
            return symbol("\\" + name + self.subscript())
        if name == "frac":
            numerator = self.scalar_argument()
            return bounded.quotient(numerator, self.scalar_argument())
        if name == "binom":
            n = self.scalar_argument()
            return bounded.binomial(n, self.scalar_argument())
        if name in ("sqrt", "cbrt"):
            return self.root(3 if name == "cbrt" else 2)
        if name in _FOLDS or name in ("int", "lim"):
            return self.opaque(name)
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"unknown command {name!r}")

    def root(self, degree: int) -> sympy.Expr:
        index: sympy.Expr = sympy.Integer(degree)
        if self.sees("["):
            index = scalar(self.sub(self.group()[1]))
        radicand = self.scalar_argument() if self.sees("{") else scalar(self.atom())
        if radicand.is_negative and index.is_Integer and index % 2:
            return -bounded.power(-radicand, 1 / index)  # the real root
        if not index.is_nonzero:
            raise Unreadable("a root of degree 0")
        return bounded.power(radicand, 1 / index)

    def function(self, name: str) -> Value:
        base: sympy.Expr | None = None
        exponent: sympy.Expr | None = None
        for _ in range(2):
            if self.accept("_"):
                base = self.scalar_argument()
            elif self.accept("^"):
                exponent = self.exponent()
        values = self.arguments()
        if name in INVERSES and exponent == -1:
            return INVERSES[name](only(values))
        result = apply(name, values, base)
        return result if exponent is None else bounded.power(result, exponent)

    def arguments(self) -> list[Value]:
        r"""What a function is applied to: a bracket, or `2x` in `\sin 2x \cos y`."""
        if self.sees("(", "{", "[", "|", "lfloor"):
            if self.sees("|", "lfloor"):
                return [self.atom()]
            _, tokens, _ = self.group()
            return several(self.sub(tokens))
        if self.peek() is not None and self.tokens[self.at].kind == "begin":
            return [self.matrix()]
        value = self.signed_power()
        while self.begins_factor() and not self.sees(*FUNCTIONS, "("):
            value = multiply(value, self.power())
        return [value]

    def opaque(self, name: str) -> sympy.Expr:
        """A sum or product of few terms is computed; another, an integral or a limit is only a name for itself."""
        bounds: dict[str, list[Token]] = {}
        while self.sees("_", "^"):
            mark = self.take().text
            bounds[mark] = self.group()[1] if self.sees("{") else [self.take()]
        body = scalar(self.term())
        lower, upper = bounds.get("_", []), bounds.get("^", [])
        if name in _FOLDS and len(lower) > 2 and lower[0].kind == "letter" and lower[1].text == "=" and upper:
            first, last = scalar(self.sub(lower[2:])), scalar(self.sub(upper))
            index = symbol(lower[0].text)
            if first.is_Integer and last.is_Integer and 0 <= last - first < bounded.MAX_SUM_TERMS:
                terms = [body.subs(index, k) for k in range(int(first), int(last) + 1)]
                return bounded.finite(_FOLDS[name](*terms))
            return sympy.Function(name)(body, index, first, last)
        written = sympy.Symbol(" ".join(token.text for token in (*lower, *upper)), real=True)
        return sympy.Function(name)(body, written)

    def matrix(self) -> Value:
        environment, tokens, closing = self.group()
        if environment == "array" and tokens and tokens[0].text == "{":
            tokens = tokens[next(i for i, token in enumerate(tokens) if token.text == "}") + 1 :]
        if environment != closing or environment not in ("matrix", "pmatrix", "bmatrix", "vmatrix", "array", "Bmatrix"):
            raise Unreadable(f"environment {environment!r}")
        rows = [split(row, "&") for row in split(tokens, "row") if row]
        if not rows or len({len(row) for row in rows}) > 1:
            raise Unreadable("a ragged matrix")
        entries = sympy.ImmutableMatrix([[scalar(self.sub(cell)) for cell in row] for row in rows])
        return determinant(entries) if environment == "vmatrix" else entries


def interval_ends(value: Bracketed) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The two ends of what may be an interval."""
    if len(value.items) != 2 or value.opening not in "([" or value.closing not in ")]":
        return None
    low, high = value.items
    if isinstance(low, sympy.Expr) and isinstance(high, sympy.Expr):
        return low, high
    return None
