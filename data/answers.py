"""Reading the gold answer out of a source's answer column, and cleaning it without changing its value."""

import re

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_TRAILING_LAYOUT = re.compile(r"(?:\s|\\\\|\\noindent(?![a-zA-Z])|\\end\{problem\})+\Z")
_INTEGER = re.compile(r"([-+\u2212]?)(\d+|\d{1,3}(?:,\d{3})+)(?:\.0*)?")


def split_gsm8k(text: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a GSM8K answer column, None without a `####`.

    The reasoning loses its calculator annotations (`<<48/2=24>>`), the answer its commas.
    """
    reasoning, mark, answer = text.rpartition("####")
    if not mark:
        return None
    return _CALCULATOR.sub("", reasoning).strip(), answer.replace(",", "").strip()


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, braces balanced; None if there is none or it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2  # an escaped brace, as in \{1,2\}, does not count
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
        i += 1
    return None


def strip_layout(text: str) -> str:
    r"""The text without the page layout that LaTeX sources end in (`\\ \noindent \end{problem}`)."""
    return _TRAILING_LAYOUT.sub("", text).strip()


def clean_answer(value: object) -> str:
    """An answer cell as text; empty for a missing one (None, NaN).

    Whole floats lose their `.0` (a column of 142.0 is how a table stores integers that may be absent), and
    layout residue, a closing full stop and one pair of outer dollar signs go.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = re.sub(r"(?<!\.)\.\Z", "", strip_layout(str(value)))
    inner = re.fullmatch(r"\$([^$]+)\$", text)
    return inner.group(1).strip() if inner else text


def canonical_integer(text: str) -> str | None:
    """`"27"` for 27, 027, 27.0, +27 and `"1000"` for 1,000 and 1{,}000; None for what is no integer."""
    match = _INTEGER.fullmatch(text.strip().replace("{,}", ","))
    if match is None:
        return None
    # By text and not by int(): exact at any length, and Python refuses to parse over 4,300 digits.
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return ("-" if match[1] in ("-", "\u2212") and digits != "0" else "") + digits
