"""Comparison of two answers beyond plain numbers and equal strings; slow on odd input, so workers call it.

Importing this module loads nothing; the first call imports sympy.
"""


def symbolically_equal(answer: str, gold: str) -> bool:
    r"""Is the bare `answer` mathematically equal to the bare `gold`, by kind (see docs/verifier.md)?

    Exact: no tolerance, and nothing is evaluated as code. What cannot be read, is too large to be computed, or
    is not proven equal is not equal. Not symmetric in one respect: a gold may be sloppy where an answer may not
    (`1 = x = 0` has the value 0 only as a gold).
    """
    from .compare import equal_answers

    return equal_answers(answer, gold)
