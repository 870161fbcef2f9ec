"""Drawing tokens: the inverse of the cumulative distribution, and the random streams."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_models import processed

from rl.rollout.sampling import choose, draw, mix, process_logits, stream_key, uniform

EDGE = 1 - 2.0**-53  # the largest number that `uniform` gives


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def at(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 2, 3, 256])
def test_draw_is_the_inverse_of_the_cumulative_distribution(chunk):
    logp = logs(0.25, 0.0, 0.5, 0.125, 0.125)
    ends = {0.0: 0, 0.2499: 0, 0.25: 2, 0.7499: 2, 0.75: 3, 0.8749: 3, 0.875: 4, EDGE: 4}
    got = draw(logp.exp().expand(len(ends), -1), at(*ends), chunk)
    assert got.tolist() == list(ends.values())
    assert got.dtype == torch.long


@pytest.mark.parametrize("vocabulary", [4, 255, 256, 257, 700])
def test_draw_never_gives_an_impossible_token(vocabulary):
    """One possible token, anywhere; the extremes of the uniform number; zeros before, between and after."""
    generator = torch.Generator().manual_seed(vocabulary)
    extremes = at(0.0, 2.0**-53, 0.5, EDGE)
    for only in {0, 1, vocabulary // 2, vocabulary - 2, vocabulary - 1}:
        logp = torch.full((4, vocabulary), -math.inf)
        logp[:, only] = 0.0
        assert draw(logp.exp(), extremes).tolist() == [only] * 4
    for _ in range(200):
        logits = 3 * torch.randn(1, vocabulary, generator=generator)
        logits[torch.rand(1, vocabulary, generator=generator) < 0.6] = -math.inf
        logits[:, -2:] = -math.inf
        logits[:, 1] = 0.0
        logp = logits.log_softmax(-1)
        numbers = torch.cat([extremes, torch.rand(12, generator=generator, dtype=torch.float64)])
        got = draw(logp.exp().expand(16, -1), numbers)
        assert (logp[0, got] > -math.inf).all()
        possible = (logp[0] > -math.inf).nonzero()[:, 0]
        assert got[0] == possible[0] and got[3] == possible[-1]


def test_draw_near_the_end_of_many_tiny_probabilities():
    """float32 sums of 50,257 probabilities are off by 1e-6: neither a gap nor a step past the end."""
    generator = torch.Generator().manual_seed(0)
    logp = (0.1 * torch.randn(1, 50_257, generator=generator)).log_softmax(-1)
    cumulative = logp.exp().double().cumsum(-1)[0]
    numbers = at(*[i / 64 for i in range(64)], EDGE)
    got = draw(logp.exp().expand(len(numbers), -1), numbers)
    want = torch.searchsorted(cumulative, numbers * cumulative[-1], right=True)
    assert (got - want).abs().max() <= 1  # a token is 2e-5 wide
    assert got[-1] == 50_256


def test_draw_rows_are_independent():
    logp = torch.cat([logs(1.0, 0.0, 0.0), logs(0.0, 0.0, 1.0), logs(0.5, 0.25, 0.25)])
    assert draw(logp.exp(), at(0.9, 0.1, 0.6)).tolist() == [0, 2, 1]


def test_choose_and_process_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])
    for narrowing in ({}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.95}):
        for temperature in (0.5, 1.0, 3.0):
            options = {"top_k": 0, "top_p": 1.0, "temperature": temperature, **narrowing}
            got = process_logits(logits, **options).softmax(-1)[0]
            assert torch.allclose(got.double(), processed(logits[0], **options), atol=1e-6)
    # Half the mass lies on the first token, so any top_p up to that leaves it alone.
    assert process_logits(logs(0.5, 0.3, 0.2), 1.0, 0, 0.5).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    assert process_logits(logs(0.5, 0.3, 0.2), 1.0, 0, 1e-9).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    token, logp = choose(logits, at(EDGE), temperature=0.0, top_k=0, top_p=1.0)
    assert token.tolist() == [1]
    assert logp.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())
    token, logp = choose(logits, at(EDGE), temperature=2.0, top_k=3, top_p=1.0)
    assert token.tolist() == [2]
    assert logp.item() == pytest.approx(torch.tensor([0.5, 1.5, 1.0]).log_softmax(-1)[2].item())
    low = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert process_logits(low, 1.0, 0, 1.0).dtype == torch.float32


# ---- random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [200, 257, 9000])
def test_nucleus_of_a_large_vocabulary(vocabulary):
    """Peaked rows end within the likeliest few hundred, flat ones need thousands: both at once."""
    generator = torch.Generator().manual_seed(vocabulary)
    spread = torch.tensor([8.0, 0.1, 3.0, 0.0, 1.0])[:, None]
    logits = spread * torch.randn(5, vocabulary, generator=generator)
    got = process_logits(logits, 1.0, 0, 0.95)
    assert torch.equal(got[got.isfinite()], logits[got.isfinite()])
    for row, values in zip(got, logits, strict=True):
        assert abs(int(row.isfinite().sum()) - int((processed(values, top_p=0.95) > 0).sum())) <= 1  # rounding
        assert float(values[row.isfinite()].min()) >= float(values[row.isinf()].max())


def test_the_stream_format_is_pinned():
    """Runs resume and repeat by these numbers: they must not change. mix: splitmix64's published outputs."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317
    assert stream_key() == 0
    assert stream_key(0) == 16294208416658607535
    assert stream_key(1, 2, 3) == 15020427595393229491
    assert stream_key(-1) == 16490336266968443936
    assert stream_key(7, 1, 2, 3) == 1867368617898080398
    key = stream_key(7, 1, 2)
    known = [0.229783450730898, 0.834255896243185, 0.03944521639404974, 0.09326830742386016]
    assert [uniform(key, i) for i in range(4)] == known
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform((1 << 64) - 1, 10**9) == 0.044875615987838735


def test_uniform_numbers_look_uniform():
    numbers = [uniform(stream_key(5), i) for i in range(50_000)]
    assert min(numbers) >= 0 and max(numbers) < 1
    x = torch.tensor(numbers, dtype=torch.float64)
    assert x.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 50_000))
    assert x.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("part", ["counter", "sample", "prompt", "step", "seed"])
def test_neighbouring_streams_are_independent(part):
    """Sequences along each of the five numbers that name a draw, against the next one along."""
    place = ["seed", "step", "prompt", "sample", "counter"].index(part)

    def number(i: int) -> float:
        parts = [3, 1, 4, 1, 5]
        parts[place] += i
        return uniform(stream_key(*parts[:4]), parts[4])

    count = 8000
    x = torch.tensor([number(i) for i in range(count)], dtype=torch.float64)
    assert stats.kstest(x.tolist(), "uniform").pvalue > 0.001
    for lag in (1, 2, 64):
        correlation = torch.corrcoef(torch.stack([x[:-lag], x[lag:]]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(count)
    cells = torch.bincount(((x[:-1] * 8).long() * 8 + (x[1:] * 8).long()), minlength=64).tolist()
    assert stats.chisquare(cells).pvalue > 0.001


def test_equal_parts_in_another_order_give_another_stream():
    keys = {stream_key(*parts) for parts in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (3,), (1,), (2,)]}
    assert len(keys) == 7
