"""Rewards in a thread of their own, and what of a rollout goes through a checkpoint."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch

from rl.experience import Batch, Completion
from rl.pending import plain, restored
from rl.prompts import Prompt
from rl.rollout import Sample
from rl.scoring import EarlyScores


def completion(group: int, position: int = 0, reward: float = 0.0, routed: object = None) -> Completion:
    sample = Sample([5 + group, 2], [-0.1, -1 / 3], "stop", 4, routed)
    made = Completion(Prompt([1, position], f"prompt {position}", {"id": position}), group, position, sample, "text")
    made.reward, made.components, made.verdict = reward, {"a": reward, "b": None}, "wrong"
    return made


def test_groups_that_came_during_a_call_are_scored_by_the_next_one():
    calls: list[list[int]] = []
    entered, go_on = threading.Event(), threading.Event()

    def score(batch):
        calls.append([c.group for c in batch])
        entered.set()
        assert go_on.wait(30)

    with EarlyScores(score) as scores:
        scores.add([completion(0)])
        assert entered.wait(30)
        for group in (1, 2, 3):
            scores.add([completion(group), completion(group)])
        scores.add([])
        go_on.set()
        scores.finish()
    assert calls == [[0], [1, 1, 2, 2, 3, 3]]


def test_what_goes_wrong_is_raised_where_groups_come_from():
    def score(batch):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), EarlyScores(score) as scores:
        scores.add([completion(0)])
        scores.finish()
    failed = threading.Event()
    with pytest.raises(ValueError, match="no"), EarlyScores(score) as scores:
        scores.add([completion(0)])
        while not failed.wait(0.01):
            scores.add([completion(1)])


def test_the_thread_ends_when_sampling_fails():
    with pytest.raises(KeyError), EarlyScores(lambda batch: None) as scores:
        raise KeyError
    scores._thread.join(30)
    assert not scores._thread.is_alive()


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return "text"


def test_a_batch_comes_back_as_it_was_on_any_number_of_processes():
    routed = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    completions = [completion(g, 7 + g, reward=g / 3, routed=routed) for g in (0, 0, 1, 1, 2, 2)]
    completions[3].reward = float("nan")
    parts = [
        plain(
            Batch([c for c in completions if c.group % 2 == rank], 9, 1 + rank, {"steps": 2.0}, {"rollout": 1.0 + rank})
        )
        for rank in (0, 1)
    ]
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    parts = torch.load(file, weights_only=True)

    def at(position):
        return Prompt([1, position], f"prompt {position}", {"id": position})

    for world in (1, 2, 3):
        again = [restored(parts, rank, world, at, Tokenizer()) for rank in range(world)]
        assert [batch.resampled for batch in again] == [3, 0, 0][:world]
        assert [batch.drafts for batch in again] == [{"steps": 4.0}, {}, {}][:world]
        assert all(batch.cursor == 9 and batch.seconds == {"rollout": 1.0} for batch in again)
        for rank, batch in enumerate(again):
            expected = [c for c in completions if c.group % world == rank]
            assert len(batch.completions) == len(expected)
            for got, want in zip(batch.completions, expected, strict=True):
                assert got.sample.token_ids == want.sample.token_ids and got.sample.logprobs == want.sample.logprobs
                assert (got.sample.routed_experts == routed).all() and got.sample.routed_experts.dtype == np.uint8
                assert (got.group, got.position, got.prompt, got.components) == (
                    want.group, want.position, want.prompt, want.components
                )  # fmt: skip
                assert repr(got.reward) == repr(want.reward) and got.verdict == "wrong"
