"""Is a program's output the expected one?"""

import math
from typing import Literal, get_args

Compare = Literal["tokens", "exact"]


def check_compare(compare: str, float_tolerance: float | None) -> None:
    """Raises ValueError for what `same_output` could not follow."""
    if compare not in get_args(Compare):
        raise ValueError(f"compare must be 'tokens' or 'exact', not {compare!r}")
    if float_tolerance is None:
        return
    if compare == "exact":
        raise ValueError("float_tolerance needs compare='tokens'")
    if isinstance(float_tolerance, bool) or not isinstance(float_tolerance, (int, float)):
        raise ValueError(f"float_tolerance must be a number or None, not {float_tolerance!r}")
    if not 0 <= float_tolerance < 1:
        raise ValueError(f"float_tolerance must be at least 0 and less than 1, not {float_tolerance!r}")


def same_output(actual: str, expected: str, compare: str = "tokens", float_tolerance: float | None = None) -> bool:
    """tokens: the same words between white space. exact: the same text, but for the line ends (\\r\\n is \\n) and
    the newlines at the very end.

    float_tolerance: tokens that are both finite numbers, and not both integers, may differ by that much
    absolutely or relative to the expected one.
    """
    if compare == "exact":
        return _lines(actual) == _lines(expected)
    found, wanted = actual.split(), expected.split()
    if len(found) != len(wanted):
        return False
    return all(a == b or _close(a, b, float_tolerance) for a, b in zip(found, wanted, strict=True))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").rstrip("\n")


def _close(actual: str, expected: str, tolerance: float | None) -> bool:
    if tolerance is None or (_is_integer(actual) and _is_integer(expected)):
        return False
    a, b = _number(actual), _number(expected)
    return a is not None and b is not None and abs(a - b) <= tolerance * max(1.0, abs(b))


def _is_integer(token: str) -> bool:
    return token.lstrip("+-").isdigit()


def _number(token: str) -> float | None:
    if len(token) > 400 or not token.isascii() or "_" in token:
        return None
    try:
        value = float(token)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
