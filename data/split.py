"""Splitting by content: the same statement falls on the same side on every machine, in every order."""

import hashlib
import re
import unicodedata

# Commands that only move ink about: no problem changes its meaning without them.
_LATEX_SPACING = re.compile(
    r"\\[hv]space\*?\{[^}]*\}"
    r"|\\(?:qquad|quad|left|right|displaystyle|noindent)(?![a-zA-Z])"
    r"|\\\\|\\[,;:!> ]|\\[()\[\]]|[$~]"
)
_SAME_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2044": "/", "\u2018": "'", "\u2019": "'",
     "\u00d7": "*", "\u00f7": "/"}
)  # fmt: skip
_MEANINGLESS = re.compile(
    r"[?;\"`\u201c\u201d]"
    r"|\.(?!\d)"  # the point of 3.5 and .5 stays
    r"|(?<!\d),|,(?!\d)"  # 1,2 is not 12
    r"|(?<!\d):|:(?!\d)"  # 3:4 is not 34
)
_LOOSE_OPERATOR = re.compile(r"\s*([-+*/=<>^_(){}|])\s*")


def normalise_statement(text: str) -> str:
    r"""One form for all the ways to typeset the same statement.

    Unicode NFKC (with x\u00b2 as x^2, not as x2), case, white space, LaTeX spacing and sentence
    punctuation do not matter. Digits, signs, operators, decimal points, factorials and commas between
    numbers do: `3.5` and `35`, `5!` and `5`, `1,2` and `12` stay apart.
    """
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(map(_spell_out, text))).translate(_SAME_CHARACTERS)
    text = _LATEX_SPACING.sub(" ", text)
    text = re.sub(r"(?<=\d)\s*([,:])\s*(?=\d)", r"\1", text)
    text = _MEANINGLESS.sub(" ", text)
    text = _LOOSE_OPERATOR.sub(r"\1", text)
    return " ".join(text.casefold().split())


def _spell_out(character: str) -> str:
    """Superscripts, subscripts and fractions in a form that NFKC cannot glue to their neighbours."""
    form = unicodedata.decomposition(character).partition(" ")[0]
    if form == "<fraction>":
        return f" {character} "
    return {"<super>": "^", "<sub>": "_"}.get(form, "") + character


def held_out(statement: str, fraction: float, salt: str) -> bool:
    """Whether a statement belongs to the held-out part.

    Decided by the SHA-256 of the salt and the normalised statement alone, so that duplicates (up to
    typesetting) stay together and no other row, order or machine has a say. A greater `fraction` keeps
    everything that a smaller one holds out.
    """
    digest = hashlib.sha256(f"{salt}\0{normalise_statement(statement)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
