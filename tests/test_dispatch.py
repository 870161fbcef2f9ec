"""Who samples what: the bookkeeping, without any worker."""

from __future__ import annotations

import random

import pytest

from rl.rollout.types import Sample
from rl.rollout.workers.dispatch import MOST_TRIES, Dispatch
from rl.rollout.workers.wire import Request

SAMPLES = [Sample([1], [0.0], "stop", 0)]


def requests(lengths: list[int]) -> list[Request]:
    return [Request(key=f"k{i}", prompt=[1] * length, stream=i) for i, length in enumerate(lengths)]


def lengths(dispatch: Dispatch, worker: str) -> list[int]:
    return [len(r.prompt) for r in dispatch.unsent(worker)]


def test_longest_first_to_whoever_has_least():
    dispatch = Dispatch(requests([1, 9, 5, 7, 3]), in_flight=10)
    dispatch.deal(["a", "b"])
    assert lengths(dispatch, "a") == [9, 3, 1]  # 9 | 7 5 would be 9 | 12, and counts go before lengths
    assert lengths(dispatch, "b") == [7, 5]


def test_room_is_bounded_and_filled_as_results_come():
    dispatch = Dispatch(requests([4, 3, 2, 1]), in_flight=1)
    dispatch.deal(["a", "b"])
    assert (lengths(dispatch, "a"), lengths(dispatch, "b")) == ([4], [3])
    dispatch.was_sent("b", dispatch.unsent("b"))
    dispatch.finish("b", "k1", SAMPLES)
    dispatch.deal(["a", "b"])
    assert lengths(dispatch, "b") == [2]


def test_a_lost_worker_gives_everything_back():
    dispatch = Dispatch(requests([4, 3, 2, 1]), in_flight=4)
    dispatch.deal(["a", "b"])
    dispatch.was_sent("a", dispatch.unsent("a"))
    dispatch.finish("a", "k0", SAMPLES)
    assert dispatch.give_back("a") == ["k3"]  # asked for, and not finished
    with pytest.raises(KeyError):
        dispatch.finish("a", "k3", SAMPLES)  # too late: it will be sampled elsewhere
    dispatch.deal(["b"])
    assert lengths(dispatch, "b") == [3, 2, 1]
    assert dispatch.moved == 1


def test_a_prompt_that_every_worker_is_lost_with():
    dispatch = Dispatch(requests([4]), in_flight=4)
    with pytest.raises(RuntimeError, match=f"{MOST_TRIES} workers were lost"):
        for _ in range(MOST_TRIES):
            dispatch.deal(["a"])
            dispatch.was_sent("a", dispatch.unsent("a"))
            dispatch.give_back("a")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_prompt_is_done_once(seed):
    draw = random.Random(seed)
    dispatch = Dispatch(requests([draw.randrange(1, 50) for _ in range(40)]), in_flight=3)
    workers, finished = ["a", "b", "c"], []
    while not dispatch.complete:
        dispatch.deal(draw.sample(workers, draw.randrange(1, 4)))
        worker = draw.choice(workers)
        some = [r for r in dispatch.unsent(worker) if draw.random() < 0.7]
        dispatch.was_sent(worker, some)
        if draw.random() < 0.05:
            try:
                dispatch.give_back(worker)
            except RuntimeError:
                return  # a prompt was lost too often: the run stops with a message
        for key in dispatch.sent(worker):
            if draw.random() < 0.5:
                dispatch.finish(worker, key, SAMPLES)
                finished.append(key)
    assert sorted(finished) == sorted(f"k{i}" for i in range(40))
