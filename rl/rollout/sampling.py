"""Drawing tokens: counter-based random streams and inverse-CDF sampling.

`torch.multinomial` over 64 x 49,152 takes as long as the rest of a decode step of a 135M model; walking the
cumulative distribution to one uniform number takes a twentieth of it, and the number can come from a
stream of the sample's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """One round of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters bits."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_key(*parts: int) -> int:
    """A 64-bit key from integers such as (seed, step, prompt, sample)."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & _MASK))
    return key


def uniform(key: int, counter: int) -> float:
    """Number `counter` of the stream `key`, in [0, 1), 53 bits."""
    return (mix(key ^ mix(counter)) >> 11) * 2.0**-53


def process_logits(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] float32 of the distribution that tokens are drawn from: -inf where it is zero.

    Temperature first, then top-k, then top-p over what is left (the order of transformers and vLLM);
    temperature 0 gives the plain distribution, whatever top_k and top_p.
    """
    logits = logits_BV.float()
    if temperature == 0:
        return logits
    if temperature != 1.0:
        logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return nucleus(logits, top_p) if top_p < 1 else logits


def nucleus(logits_BV: Tensor, top_p: float, likeliest: int = 256) -> Tensor:
    """Logits with -inf outside the smallest set of likeliest tokens whose probabilities sum to at least top_p.

    The set nearly always lies within the few hundred likeliest, and finding those takes a tenth of sorting all of a
    large vocabulary; rows for which they do not suffice are sorted.
    """
    count = min(likeliest, logits_BV.shape[-1])
    probability, order = logits_BV.softmax(-1).topk(count, -1)
    # A token stays if the mass before it is below top_p; so the likeliest always stays.
    kept = probability.cumsum(-1) - probability < top_p
    inside = logits_BV.gather(-1, order).masked_fill(~kept, float("-inf"))
    kept_BV = torch.full_like(logits_BV, float("-inf")).scatter(-1, order, inside)
    # Where even the last of them stays, tokens beyond them may belong to the set too.
    wide = kept[:, -1].nonzero()[:, 0] if count < logits_BV.shape[-1] else kept.new_zeros(0, dtype=torch.long)
    if len(wide):
        kept_BV[wide] = nucleus(logits_BV[wide], top_p, min(likeliest * 16, logits_BV.shape[-1]))
    return kept_BV


def draw(weight_BV: Tensor, uniform_B: Tensor, chunk: int = 256) -> Tensor:
    """Inverse CDF: the first token whose cumulative weight exceeds uniform_B * total; [B] int64.

    Weights are probabilities up to a factor. In two levels, so that no [B, V] cumulative sum is made: first the
    chunk of the vocabulary, then the token in it. Sums are float64 over chunks, float32 within one; the total
    is the true float sum, so that rounding never leaves a gap at the end. A token of weight zero is never drawn.
    """
    batch, vocabulary = weight_BV.shape
    padding = -vocabulary % chunk
    if padding:
        weight_BV = torch.nn.functional.pad(weight_BV, (0, padding))
    chunks = weight_BV.view(batch, -1, chunk)
    ends = chunks.sum(-1).double().cumsum(-1)
    goal = uniform_B.to(ends)[:, None] * ends[:, -1:]
    which = torch.searchsorted(ends, goal, right=True).clamp(max=ends.shape[-1] - 1)
    rows = torch.arange(batch, device=weight_BV.device)
    inside = chunks[rows, which[:, 0]].double()
    before = torch.where(which > 0, ends.gather(-1, (which - 1).clamp(min=0)), 0.0)
    steps = inside.cumsum(-1)
    token = torch.searchsorted(steps, goal - before, right=True)[:, 0]
    # Rounding between the two sums can step past the chunk's last possible token: take that one.
    positions = torch.arange(chunk, device=weight_BV.device)
    last = torch.where(inside > 0, positions, 0).amax(-1)
    return which[:, 0] * chunk + torch.minimum(token, last)


def choose(
    logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_k: int, top_p: float, rows: int = 16
) -> tuple[Tensor, Tensor]:
    """(tokens [B], their log-probabilities [B] float32 in the distribution that they are drawn from).

    On CPU in pieces of `rows` rows: float32 copies of all the logits at once would be fetched from, and given back
    to, the operating system at every step, which takes longer than the arithmetic.
    """
    pieces = []
    size = rows if logits_BV.device.type == "cpu" else len(logits_BV)
    for logits, numbers in zip(logits_BV.split(size), uniform_B.split(size), strict=True):
        probability = process_logits(logits, temperature, top_k, top_p).softmax(-1)
        tokens = probability.argmax(-1) if temperature == 0 else draw(probability, numbers)
        pieces.append((tokens, probability.gather(-1, tokens[:, None])[:, 0].log()))
    return torch.cat([tokens for tokens, _ in pieces]), torch.cat([logp for _, logp in pieces])
