r"""Tokens of LaTeX and of plain mathematics: `\frac{1}{2}`, `sqrt(2)/2`, `√2 ≤ x`. Every pass is linear."""

import re
from typing import NamedTuple

from .latex import FONTS, FULL_WIDTH, GOES_ON, TEXT_COMMAND

MAX_CHARS = 10_000
MAX_TOKENS = 6_000
MAX_DIGITS = 1_000


class Unreadable(ValueError):
    """The text is not an answer that can be compared symbolically, or is too large to be."""


class Token(NamedTuple):
    """kind: number, letter, command (without the backslash), text (prose), begin, end, or symbol (itself)."""

    kind: str
    text: str
    spaced: bool  # a blank stands before it


# Unicode and ASCII spellings become the LaTeX command of the same meaning.
_SPELLINGS = {
    "√": "sqrt", "π": "pi", "∞": "infty", "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "≈": "approx",
    "∈": "in", "∉": "notin", "∪": "cup", "∩": "cap", "∅": "emptyset", "±": "pm", "∓": "mp", "×": "times", "⋅": "cdot",
    "·": "cdot", "÷": "div", "°": "degree", "ℝ": "R", "ℤ": "Z", "ℕ": "N", "≡": "equiv", "∖": "setminus",
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "θ": "theta", "λ": "lambda", "μ": "mu", "φ": "phi",
    "ω": "omega", "σ": "sigma", "ρ": "rho", "τ": "tau", "ε": "epsilon", "∠": "angle", "⌊": "lfloor", "⌋": "rfloor",
    "⌈": "lceil", "⌉": "rceil", "⟨": "langle", "⟩": "rangle",
}  # fmt: skip
_CHARS = {ord(char): f" \\{name} " for char, name in _SPELLINGS.items()} | {
    ord(char): f"^{{{digit}}}" for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)
}
_CHARS |= {ord(char): plain for char, plain in FULL_WIDTH.items()}
_CHARS |= dict.fromkeys(map(ord, "\u2212\u2013\ufe63"), "-")
_CHARS |= dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " ")
_CHARS |= dict.fromkeys(map(ord, "\ufeff\u200b\u2060"), "")
_CHARS |= {ord("\u2044"): "/"} | dict.fromkeys(map(ord, '"\u201c\u201d'), " ")

_SYNONYMS = {
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">",
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "ast": "*",
    "varnothing": "emptyset", "arctan": "atan", "arcsin": "asin", "arccos": "acos", "arccot": "acot",
    "lbrace": "{set", "rbrace": "}set", "lbrack": "[", "rbrack": "]", "vert": "|", "lvert": "|", "rvert": "|",
    "mid": "|", "circ": "degree", "land": "and", "lor": "or", "colon": ":", "to": "rightarrow", "tg": "tan",
    "varphi": "phi", "varepsilon": "epsilon", "infin": "infty", "inf": "infty", "backslash": "setminus",
    "doteq": "=", "simeq": "approx", "thickapprox": "approx", "sim": "approx", "bmod": "mod", "ctg": "cot",
    "bigcup": "cup", "bigcap": "cap", "infinity": "infty", "union": "cup", "reals": "R", "degrees": "degree",
    "ll": "<", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "deg": "degree",
}  # fmt: skip
FUNCTIONS = frozenset(
    """sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth arcsinh arccosh arctanh
    ln log lg exp sqrt cbrt floor ceil ceiling abs gcd lcm max min det factorial binom""".split()
)
# Words of plain mathematics, which are written without a backslash.
_PLAIN_WORDS = FUNCTIONS | {"pi", "infinity", "infty", "inf", "arctan", "arcsin", "arccos", "and", "or", "union"}
_PLAIN_WORDS |= {"theta", "alpha", "beta", "gamma", "lambda", "degrees", "mod", "in", "cup"}

_IGNORED = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"
    r"|(?<!\\)\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|noindent|hline)(?![A-Za-z])"
    r"|(?<!\\)\\(?:qquad|quad|thinspace|enspace|hspace\{[^{}]*\}|phantom\{[^{}]*\})"
    r"|(?<!\\)\\[,;:> !$()\[\]]|~|\$|`|\*\*"
)
# JSON and Python escapes double the backslash of a command. `\\` is otherwise the end of a matrix row.
_DOUBLED = re.compile(
    r"(?<!\\)\\\\(?=(?:[dtc]?frac|sqrt|left|right|text(?:bf|rm|it)?|mathrm|boxed|pi|leq?|geq?|neq?|infty|cup|in|pm"
    r"|cdot|times|begin|end|circ|sin|cos|tan|log|ln|quad|theta|alpha|beta|\{|,|!|;)(?![a-z]))"
)
_SEPARATOR = re.compile(r",\\!\s?|\s?\{\s?,\s?\}\s?")  # 11,\! 100 and 14{,}916
_STYLE = re.compile(
    r"\\(?:mathbf|boldsymbol|mathit|mathcal|mathsf|vec|underline)\s*\{([^{}]*)\}"
    r"|\\(?:overline|widehat|bar|hat)\s*\{\s*([A-Z][A-Z]+)\s*\}"  # a segment, an arc, an angle
)
# An accent makes another variable: the conjugate of z is not z. Over anything else it cannot be read.
_ACCENT = re.compile(
    r"\\(bar|hat|overline|widehat|tilde)\s*(?:\{\s*([A-Za-z])\s*\}|(?<![a-z])\s([A-Za-z])(?![A-Za-z]))"
)
_ALIGNED = re.compile(r"(?<!\\)\\(?:begin|end)\s*\{(?:aligned|align|gathered|split)\*?\}")
_NEXT_LINE = re.compile(r"(?<!\\)\\\\(?![\\A-Za-z])(?P<relation>[\s&]*=)?")
_TOKEN = re.compile(
    rf"""(?P<blank>\s+)
    | (?P<prose>{TEXT_COMMAND}(?P<words>[^{{}}]*)\}}(?:\s*\^\s*(?:[23]|\{{[23]\}}))?)
    | \\(?P<edge>begin|end)\s*\{{(?P<environment>[a-zA-Z]+)\*?\}}
    | \\mathbb\s*(?:\{{\s*)?(?P<numbers>[A-Z])(?:\s*\}})?
    | (?P<number>[0-9]+(?:,[0-9]{{3}}(?![0-9]))*(?:\.[0-9]+)?|[0-9]+\.(?![0-9])|\.[0-9]+)
    | \\(?P<command>[A-Za-z]+)
    | \\(?P<escaped>[{{}}%\\&#|_])
    | (?P<joiner>(?<=[0-9)}}\]])(?:or|and))(?![a-z])
    | (?P<word>[A-Za-z]+)
    | (?P<relation><=|>=|!=|==|->|\.\.\.)
    | (?P<symbol>[-+*/^_=<>(){{}}\[\],;:!|%&'])""",
    re.VERBOSE,
)
_RELATIONS = {"<=": "le", ">=": "ge", "!=": "ne", "==": "=", "->": "rightarrow", "...": "ldots"}
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")


# 0.1\overline{6}: digits before the period, then the period.
_PERIODIC = re.compile(
    r"(?P<whole>[0-9]{0,40})\.(?P<head>[0-9]{0,40})\\(?:overline|bar|dot)\s*\{(?P<period>[0-9]{1,40})\}"
)


def tokenize(text: str, *, grouped: bool = True) -> list[Token]:
    """The tokens of an answer. Raises Unreadable where it contains what is not mathematics, or is too long.

    grouped: read `1,234` as one number, not as two.
    """
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    text = _SEPARATOR.sub(",", text).translate(_CHARS)
    text = _PERIODIC.sub(_periodic, text)
    text = FONTS.sub("", _DOUBLED.sub(r"\\", text))
    if _ALIGNED.search(text):  # lines are values, but one that begins with "=" goes on with the last
        text = _NEXT_LINE.sub(lambda line: " = " if line["relation"] else " , ", _ALIGNED.sub(" ", text)).replace(
            "&", " "
        )
    text = _STYLE.sub(r"{\1\2}", _ACCENT.sub(_accented, _IGNORED.sub(" ", text)))
    text = text.strip()
    text = text if GOES_ON.search(text) else text.rstrip(".,;:\\ \n")
    tokens: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"unexpected {text[position]!r}")
        position = match.end()
        if match["blank"]:
            spaced = True
            continue
        tokens += _tokens_of(match, spaced, grouped)
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too many tokens")
    return tokens


def _tokens_of(match: re.Match[str], spaced: bool, grouped: bool) -> list[Token]:
    if match["number"]:
        return _numbers(match["number"], spaced, grouped)
    if match["prose"]:
        words = match["words"]  # \mathrm{~m} is a unit, \mathrm{e} a letter
        unit = words[:1] == " " and len(words.strip()) == 1
        return [Token("text", words.strip(), spaced) if unit else _prose(words.strip(" ,"), spaced)]
    if match["edge"]:
        return [Token(match["edge"], match["environment"], spaced)]
    if match["numbers"]:
        return [Token("command", match["numbers"], spaced)]
    if match["command"]:
        name = _SYNONYMS.get(match["command"], match["command"])
        return [Token("symbol" if not name.isalpha() else "command", name, spaced)]
    if match["escaped"]:
        name = {"{": "{set", "}": "}set", "\\": "row", "|": "|"}.get(match["escaped"], match["escaped"])
        return [Token("symbol", name, spaced)]
    if match["joiner"]:
        return [Token("command", match["joiner"], spaced)]
    if match["word"]:
        return _word(match["word"], spaced)
    if match["relation"]:
        name = _RELATIONS[match["relation"]]
        return [Token("command" if name.isalpha() else "symbol", name, spaced)]
    return [Token("symbol", match["symbol"], spaced)]


def _accented(match: re.Match[str]) -> str:
    """As a subscript, which is part of a variable's name. The two widths of an accent are one."""
    name = {"overline": "bar", "widehat": "hat"}.get(match[1], match[1])
    return f"{{{match[2] or match[3]}_{{{name}}}}}"


def _periodic(match: re.Match[str]) -> str:
    """A repeating decimal as a LaTeX fraction."""
    head, period = match["whole"] + match["head"], match["period"]
    numerator = int(head + period) - int(head or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(match['head'])}}}"


def _numbers(digits: str, spaced: bool, grouped: bool) -> list[Token]:
    if "," in digits and not (grouped and _GROUPED.fullmatch(digits)):
        parts = re.split("(,)", digits)
        return [Token("symbol" if part == "," else "number", part, spaced) for part in parts]
    if len(digits) > MAX_DIGITS:
        raise Unreadable("too many digits")
    return [Token("number", digits.replace(",", ""), spaced)]


def _prose(words: str, spaced: bool) -> Token:
    """`\\text{and}` separates, `\\mathrm{e}` is a letter, `\\operatorname{arcsin}` a command; the rest is prose."""
    name = _SYNONYMS.get(words, words)
    if name in _PLAIN_WORDS:
        return Token("command", name, spaced)
    return Token("letter", words, spaced) if len(words) == 1 and words.isalpha() else Token("text", words, spaced)


def _word(word: str, spaced: bool) -> list[Token]:
    """A run of letters: a known word, prose of four letters and more after a blank, or a product of letters."""
    known = word.lower() if word.lower() in ("and", "or", "sqrt") else word
    if known in _PLAIN_WORDS:
        return [Token("command", _SYNONYMS.get(known, known), spaced)]
    if len(word) >= 4 or (len(word) > 1 and spaced and word.islower() and word in UNIT_WORDS):
        return [Token("text", word, spaced)]
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(word)]


UNIT_WORDS = frozenset("cm km mm nm kg mg ml ft oz lb lbs mph hr hrs min sec pct units".split())
