"""Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13).

With L = number of completion tokens, M = max_length, B = buffer:

    r = 0              if L <= M - B
    r = (M - B - L)/B  if M - B < L <= M       (from 0 down to -1)
    r = -1             if L > M

None is never returned: every completion has a length.
"""

from collections.abc import Sequence
from typing import Any


def soft_overlong(completion_ids: Sequence[Sequence[Any]], *, max_length: int, buffer: int) -> list[float]:
    """Between -1 and 0 per completion. Raises ValueError unless 0 < buffer <= max_length (tokens)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"need 0 < buffer <= max_length, got buffer={buffer}, max_length={max_length}")
    free = max_length - buffer
    return [min(0.0, max(-1.0, (free - len(ids)) / buffer)) for ids in completion_ids]
