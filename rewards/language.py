"""Language consistency (DeepSeek-R1, arXiv 2501.12948, section 2.3.2): does the model think in one language?

    r = words of the reasoning in the target language / all its words        (from 0 to 1)

The reasoning is the text up to the last `</think>`, without tags; without one, everything. Code, LaTeX, numbers,
addresses, operators (sin) and units (cm) belong to no language and are left out, and so are single Latin and Greek
letters, which are variables.

What is measured is the *script*: a word counts as English if it is written in Latin letters. This tells English from
Chinese, Japanese, Russian or Arabic, the mixing that R1 has this reward against; it cannot tell English from French,
nor Chinese from Japanese that has no kana in it. In scripts written without blanks (Han, kana, Thai, Lao, Khmer,
Burmese, Tibetan) every letter counts as one word.

None: the reasoning has no words (a bare formula), so there is nothing to measure.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

from .errors import did_you_mean
from .messages import Completion, completion_text

# ISO 639-1 codes by the scripts that their words are written in. Scripts are the first word of a Unicode character
# name, which needs no table of code points.
_SCRIPTS_OF_LANGUAGE = {
    **dict.fromkeys(
        "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv sw tl tr "
        "uz vi zu".split(),
        ("LATIN",),
    ),
    **dict.fromkeys("be bg kk ky mk mn ru sr tg uk".split(), ("CYRILLIC",)),
    **dict.fromkeys("ar fa ps ur".split(), ("ARABIC",)),
    **dict.fromkeys("hi mr ne sa".split(), ("DEVANAGARI",)),
    **dict.fromkeys("as bn".split(), ("BENGALI",)),
    "am": ("ETHIOPIC",),
    "bo": ("TIBETAN",),
    "el": ("GREEK",),
    "gu": ("GUJARATI",),
    "he": ("HEBREW",),
    "hy": ("ARMENIAN",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ka": ("GEORGIAN",),
    "km": ("KHMER",),
    "kn": ("KANNADA",),
    "ko": ("HANGUL",),
    "lo": ("LAO",),
    "ml": ("MALAYALAM",),
    "my": ("MYANMAR",),
    "or": ("ORIYA",),
    "pa": ("GURMUKHI",),
    "si": ("SINHALA",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "th": ("THAI",),
    "zh": ("CJK", "BOPOMOFO"),
}
_WITHOUT_BLANKS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
_OF_VARIABLES = frozenset({"LATIN", "GREEK"})
_SYMBOLS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp log ln lg lim max min sup inf mod gcd lcm det "
    "sqrt cm mm km kg".split()
)

# Unclosed constructs must not make the search quadratic: no alternative looks beyond the next opening of its kind.
_NO_LANGUAGE = re.compile(
    r"```.*?```"
    r"|`[^`\n]*`"
    r"|\$\$[^$]*\$\$"
    r"|\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)"  # as Pandoc reads it, so that "$5 or $6" is money
    r"|\\\[(?:(?!\\[\[\]]).)*+\\\]"
    r"|\\\((?:(?!\\[()]).)*+\\\)"
    r"|\\(?:begin|end|label|ref|mathrm|operatorname)\*?\{[^{}]{0,100}\}"
    r"|\\[A-Za-z]+"
    r"|https?://\S+"
    r"|</?[A-Za-z][\w-]*/?>"
    r"|\d[\d.,]*(?:[A-Za-z]{1,3}(?![A-Za-z]))?",  # 3.5, 12cm
    re.DOTALL,
)


def language(
    completions: Sequence[Completion],
    target_language: Sequence[str | None] | None = None,
    *,
    target: str = "en",
    prefill: str = "",
) -> list[float | None]:
    """A share from 0 to 1 per completion, None without words.

    target: the ISO 639-1 code of the language to think in, such as "en" or "zh".
    target_language: a data column with the code of each sample; None in it stands for `target`.
    Raises ValueError for a code that is not known.
    """
    _scripts(target)  # tells of a wrong one even where the column fills every row
    codes = [target] * len(completions) if target_language is None else [code or target for code in target_language]
    return [
        language_share(prefill + completion_text(completion), code)
        for completion, code in zip(completions, codes, strict=True)
    ]


def language_share(response: str, code: str) -> float | None:
    """The share of the words of the response's reasoning that are in the language."""
    wanted, total, found = _scripts(code), 0, 0
    for script, count in _words(reasoning(response)):
        total += count
        found += count * (script in wanted)
    return found / total if total else None


def reasoning(response: str) -> str:
    """What stands before the last `</think>`; everything if there is none."""
    before, closed, after = response.rpartition("</think>")
    return before if closed else after


def _scripts(code: str) -> tuple[str, ...]:
    try:
        return _SCRIPTS_OF_LANGUAGE[code.lower()]
    except (KeyError, AttributeError):
        known = sorted(_SCRIPTS_OF_LANGUAGE)
        near = did_you_mean(code, known) if isinstance(code, str) else ""
        raise ValueError(f"unknown language code {code!r}{near}; known: {', '.join(known)}") from None


def _words(text: str) -> Iterator[tuple[str, int]]:
    """(script, number of words) for each run of letters of one script."""
    plain = unicodedata.normalize("NFC", _NO_LANGUAGE.sub(" ", text))
    for script, run in groupby(plain, _script):
        if not script:
            continue
        word = "".join(run)
        if script in _WITHOUT_BLANKS:
            yield script, len(word)
        elif not (script in _OF_VARIABLES and (len(word) == 1 or word.lower() in _SYMBOLS)):
            yield script, 1


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The script of a letter or vowel sign, such as "LATIN"; "" for anything else, mathematical letters too."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    form = unicodedata.decomposition(character).partition(" ")[0]
    if form in ("<wide>", "<narrow>"):
        return _script(unicodedata.normalize("NFKC", character)[0])
    if form in ("<font>", "<super>", "<sub>", "<compat>", "<circle>", "<square>"):
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    return {"IDEOGRAPHIC": "CJK", "KATAKANA-HIRAGANA": "KATAKANA", "COMBINING": ""}.get(first, first)
