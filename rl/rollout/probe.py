"""Does the sampler hold the trainer's weights? Log-probabilities of one sequence, compared after an update.

A weight that was not replaced, was replaced by another layer's, or is kept a second time in another form leaves a
sampler that works and is wrong. Checksums do not see it; the model's own answers do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

LENGTH = 64  # of the sequence, in tokens


class ProbeFailed(RuntimeError):
    """The sampler's log-probabilities are not those of the weights that it was sent."""


def probe_tokens(vocabulary: int, length: int = LENGTH, seed: int = 0) -> list[int]:
    """A fixed sequence of tokens from all over the vocabulary.

    Random ones: rare tokens have rows of the embedding and of the head that ordinary text does not reach.
    """
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(length)]


def check_probe(trainer: Sequence[float], sampler: Sequence[float], tolerance: float, version: int) -> float:
    """The mean |difference| in nats of the log-probabilities of the same tokens; ProbeFailed if above `tolerance`.

    The mean over tokens and not the largest: in bfloat16 two right implementations differ by tenths of a nat on
    single tokens, while a stale weight shifts nearly all of them. Numbers that are not finite fail.
    """
    if len(trainer) != len(sampler) or not trainer:
        raise ValueError(f"probe: {len(trainer)} log-probabilities by the trainer, {len(sampler)} by the sampler")
    gaps = [abs(a - b) for a, b in zip(trainer, sampler, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    if mean <= tolerance:  # false for NaN
        return mean
    raise ProbeFailed(
        f"after update {version} the sampler does not have the trainer's weights: on a probe of {len(gaps)} tokens the "
        f"trainer's mean log-probability is {math.fsum(trainer) / len(trainer):.4f}, the sampler's "
        f"{math.fsum(sampler) / len(sampler):.4f}; mean |difference| {mean:.4g} nats, largest {max(gaps):.4g}, "
        f"tolerance {tolerance:.4g}. A weight is stale or was sent under another name (an output head tied to the "
        f"embedding, experts, fused projections): restart the sampler from a checkpoint of this model. If it then "
        f"fails at once too, the two compute differently (dtype, quantisation, attention): raise the tolerance"
    )
