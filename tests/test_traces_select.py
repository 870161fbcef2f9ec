"""Filters: each drops what it should for the reason it names, and the choice does not depend on the order."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from data.select import FILTERS, select, similarity
from data.trace_spec import SelectSpec
from data.traces import Trace

WORDS = "first we note that the sum grows so take another look at what remains and divide by two".split()


def trace(number: int = 0, problem: str = "p", **changes: object) -> Trace:
    """A good trace, unlike those of other numbers."""
    drawn = random.Random(number)
    thinking = " ".join(drawn.choice(WORDS) for _ in range(40 + number))
    made = Trace(
        problem, "prompt", thinking, "It is 4.", sample=number, verdict="correct", reward=1.0, language=1.0,
        thinking_tokens=40 + number, answer_tokens=4,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def reason(made: Trace, **spec: object) -> str | None:
    (judged,), _ = select([made], SelectSpec(**spec))  # type: ignore[arg-type]
    return judged.dropped


def test_a_good_trace_stays() -> None:
    assert reason(trace()) is None


@pytest.mark.parametrize(
    ("changes", "expected", "off"),
    [
        ({"finish_reason": "length"}, "unfinished: length", {"finished": False}),
        ({"answer": ""}, "unfinished: the reasoning never ends", {"finished": False}),
        ({"thinking": ""}, "no reasoning", {"reasoning": False}),
        ({"verdict": "wrong", "reward": 0.0}, "not correct: wrong", {"min_reward": None}),
        ({"verdict": "timeout", "reward": 0.0}, "not correct: timeout", {"min_reward": None}),
        ({"verdict": None, "reward": 0.5}, "not correct: reward below min_reward", {"min_reward": 0.5}),
        ({"verdict": "correct", "reward": 0.9}, "not correct: reward below min_reward", {"min_reward": 0.9}),
        ({"verdict": None, "reward": None}, "not correct: no reward applies", {"min_reward": None}),
        ({"language": 0.94}, "language: less than 95% en", {"language": None}),
        ({"thinking": "a\n```python\nx\n```"}, "code block in the reasoning", {"code_blocks": True}),
        ({"thinking": "a\n\n" + "b" * 4001}, "paragraph of over 4000 characters", {"max_paragraph": None}),
        ({"repetition": 0.31}, "repetition over 30%", {"max_repetition": None}),
    ],
)
def test_each_filter_and_its_switch(changes: dict[str, object], expected: str, off: dict[str, object]) -> None:
    made = trace(**changes)
    assert reason(made) == expected
    assert reason(made, **off) is None


def test_bounds_are_inclusive() -> None:
    assert reason(trace(), min_tokens=44, max_tokens=44) is None
    assert reason(trace(), min_tokens=45) == "shorter than 45 tokens"
    assert reason(trace(), max_tokens=43) == "longer than 43 tokens"
    assert reason(trace(language=0.95)) is None and reason(trace(language=None)) is None
    assert reason(trace(repetition=0.3)) is None
    assert reason(trace(thinking="x" * 2000 + "\n \n" + "y" * 4000)) is None
    with pytest.raises(ValueError, match="below min_tokens"):
        SelectSpec(min_tokens=5, max_tokens=4)


def test_stray_tags_cannot_be_switched_off() -> None:
    for part in ("thinking", "answer"):
        assert reason(trace(**{part: "a </think> b"}), min_reward=None) == "stray <think> tags"


def test_counts_add_up_and_every_trace_comes_back() -> None:
    made = [trace(i, f"p{i % 5}", reward=float(i % 3 > 0), verdict="correct" if i % 3 else "wrong") for i in range(30)]
    made += [trace(i, f"p{i % 5}", finish_reason="length", reward=0.0, verdict="unparsed") for i in range(30, 37)]
    judged, stages = select(made, SelectSpec(per_problem=2))
    assert [stage.name for stage in stages] == [*FILTERS, "problem"]
    assert {(t.id, t.sample) for t in judged} == {(t.id, t.sample) for t in made} and len(judged) == 37
    assert stages[0].came == 37 and stages[0].dropped == {"unfinished: length": 7}
    assert all(earlier.kept == later.came for earlier, later in zip(stages, stages[1:], strict=False))
    assert stages[-1].kept == sum(t.dropped is None for t in judged) == 10
    by_reason = Counter(t.dropped for t in judged if t.dropped)
    assert by_reason == sum((Counter(stage.dropped) for stage in stages), Counter())


def test_near_copies_lose_to_the_preferred_one() -> None:
    long = trace(3)
    copy = replace(long, sample=9, thinking=long.thinking + " Done.", thinking_tokens=2)
    other = trace(5)
    for order in ([long, copy, other], [other, copy, long]):
        judged, _ = select(order, SelectSpec(prefer="shortest"))
        assert {t.sample: t.dropped for t in judged} == {
            3: "near copy of another trace of the problem", 5: None, 9: None,
        }  # fmt: skip
    judged, _ = select([long, copy], SelectSpec(max_similarity=None))
    assert all(t.dropped is None for t in judged)
    judged, _ = select([long, replace(copy, id="another problem")], SelectSpec())
    assert all(t.dropped is None for t in judged)


def test_shortest() -> None:
    judged, _ = select([trace(i) for i in (7, 2, 9, 4)], SelectSpec(per_problem=2, prefer="shortest"))
    assert [t.sample for t in judged if t.dropped is None] == [2, 4]
    assert [t.dropped for t in judged if t.dropped] == ["over 2 of the problem"] * 2


def test_random_is_seeded_unbiased_by_length_and_stable() -> None:
    made = [trace(i, f"p{j}") for i in range(4) for j in range(100)]
    spec = SelectSpec(per_problem=1, prefer="random")

    def chosen(seed: int) -> dict[str, int]:
        shuffled = random.Random(seed + 1).sample(made, len(made))
        return {t.id: t.sample for t in select(shuffled, spec, seed=seed)[0] if t.dropped is None}

    assert chosen(0) == {t.id: t.sample for t in select(made, spec, seed=0)[0] if t.dropped is None}
    assert chosen(0) != chosen(1)
    counts = Counter(chosen(0).values())
    assert set(counts) == {0, 1, 2, 3} and max(counts.values()) < 45
    # A further trace of one problem changes nothing for the others.
    more = {t.id: t.sample for t in select([*made, trace(4, "p0")], spec)[0] if t.dropped is None}
    assert {k: v for k, v in more.items() if k != "p0"} == {k: v for k, v in chosen(0).items() if k != "p0"}


def test_diverse_takes_the_farthest() -> None:
    base = "we add the numbers one by one and check the total again at the end of it all"
    near = base.replace("again", "twice")
    far = "split the set into halves , count pairs by symmetry , then subtract those counted double before"
    texts = {0: base, 1: near, 2: far}
    made = [trace(i, thinking=text, thinking_tokens=20 + i) for i, text in texts.items()]
    judged, _ = select(made, SelectSpec(per_problem=2, prefer="diverse", max_similarity=None))
    assert [t.sample for t in judged if t.dropped is None] == [0, 2]
    shortest, _ = select(made, SelectSpec(per_problem=2, prefer="shortest", max_similarity=None))
    assert [t.sample for t in shortest if t.dropped is None] == [0, 1]


def test_similarity_is_jaccards() -> None:
    a, b = frozenset({("x",), ("y",)}), frozenset({("y",), ("z",)})
    assert similarity(a, b) == pytest.approx(1 / 3) and similarity(frozenset(), frozenset()) == 1.0
