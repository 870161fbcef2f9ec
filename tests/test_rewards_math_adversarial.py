"""Hostile and hedging answers through the whole verifier: no false reward, no exception, no slow call, no trace."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import rewards.math.pool as pool_module
from rewards.math import Grade, grade, grade_many
from rewards.math.pool import Pool

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "verifier" / "adversarial.jsonl"
MAX_SECONDS = 5.0


class Row(NamedTuple):
    response: str
    gold: str
    expected: bool | None


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


# Against a gold that is no number, so that nothing is refused before it reaches a worker, and against a number.
HOSTILE = [
    r"2^{10^{10}}", r"9^{9^{9^{9}}}", r"10^{10^{10}!}", r"(10^9)!", r"1000000!!", r"((50!)!)!",
    r"\binom{10^{12}}{5 \cdot 10^{11}}", r"\sum_{k=1}^{10^{12}} \frac{1}{k^3}", r"\prod_{k=1}^{10^{9}} (k+x)",
    r"(1+x+y+z+w)^{5000}", r"(x+y)^{10^{9}}", r"\sqrt[10^9]{2}", r"\frac{1}{7^{10^{8}}}", r"2^{-10^{9}}",
    r"\sin(\sin(\sin(10^{10^{10}})))", r"\log_2(3^{10^{9}})", r"e^{e^{e^{e^{e}}}}", r"i^{i^{i^{i^{i}}}}",
    r"\lfloor \pi \cdot 10^{10^{7}} \rfloor", "+".join(rf"\sqrt{{{n}}}" for n in range(2, 90)),
    "*".join(f"(x+{n})" for n in range(200)), r"\frac{1}{" * 150 + "x" + "}" * 150, "-" * 1500 + "1",
    "(" * 900 + "x" + ")" * 900, "x^" * 800 + "x", r"\begin{pmatrix}" + "&".join("x" * 300) + r"\end{pmatrix}",
    r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(150)) + r"\}", "|" * 1000, r"\left" * 300, "1e999999999",
]  # fmt: skip
INJECTIONS = [
    "__import__('os').system('touch TRACE')",
    "open('TRACE','w').write('x')",
    "exec(\"open('TRACE','w')\")",
    "x.__class__.__mro__[1].__subclasses__()",
    "(lambda: __import__('os').chdir('/'))()",
    "__import__('os').environ.update(TRACE='1')",
    "Symbol('x'); import os; os.mkdir('TRACE')",
    r"\input{/etc/passwd}",
    r"\write18{touch TRACE}",
    "[c for c in ().__class__.__base__.__subclasses__()]",
]
HEDGES = [
    "73 or 74", r"73 \text{ or } 74", "73, 74", r"\{73, 74\}", "(73, 74)", "[73, 74]", r"72 < x < 74", "x", r"\pm 73",
    "74 = 73", "73 = 74", "2x = 73", r"73 \neq 74", r"73 \vee 74", "73/74", "73|74", "73; 74", r"73 \pm 1",
    r"\begin{pmatrix} 73 & 74 \end{pmatrix}", r"x = 73 \text{ or } x = 74", r"x \in \{73, 74\}", r"[72, 74]",
    r"x \in \mathbb{R}", r"\mathbb{Z}", r"73 \text{ if } x = 1, 74 \text{ otherwise}", r"\text{any integer}",
    r"\begin{cases} 73 \\ 74 \end{cases}", r"x \le 73", r"73 \cup 74", r"\max(73, 74)", r"73 + c", "73x",
    r"\approx 73.00000001", "73.00000001", r"\infty", r"\frac{0}{0}", r"\text{NaN}", r"73 \to 74",
]  # fmt: skip
OWN = [
    *(Row(_boxed(answer), gold, False) for answer in (*HOSTILE, *INJECTIONS) for gold in ("73", "x + 73")),
    *(Row(_boxed(answer), "73", False) for answer in HEDGES),
    *(Row(f"The answer is {text}", "73", False) for text in INJECTIONS),
    Row(_boxed(r"\frac{1}{2006!}"), r"\frac{1}{2004!}", False),
    Row(_boxed("2^{-98}"), "2^{-99}", False),
    Row(_boxed(r"\frac{1}{10^{40}} + x"), "x", False),
    Row(_boxed(r"\sqrt{5329}"), "73", True),
    Row(_boxed("70 + 3"), "73", True),
    Row(_boxed(r"\frac{x^2-1}{x-1}"), "x+1", True),
]


def _rows() -> list[Row]:
    rows = list(OWN)
    if SHARED.is_file():
        lines = SHARED.read_text(encoding="utf-8").splitlines()
        rows += [Row(row["pred"], row["gold"], row["expected"]) for row in map(json.loads, lines)]
    return rows


ROWS = _rows()


@pytest.fixture
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Two workers that remember nothing of other tests."""
    pool = Pool(size=2)
    monkeypatch.setattr(pool_module, "_shared", pool)
    yield pool
    pool.close()


@pytest.fixture
def no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_pool: Pool) -> Iterator[None]:
    """Nothing changes in this process or in the folder where it and its workers are."""
    monkeypatch.chdir(tmp_path)
    environment, threads = _environment(), threading.active_count()
    yield
    assert os.getcwd() == str(tmp_path) and os.listdir(tmp_path) == []
    assert _environment() == environment
    assert threading.active_count() == threads


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def _timed(row: Row) -> tuple[Grade, float]:
    start = time.monotonic()
    return grade(row.response, row.gold), time.monotonic() - start


def _check(found: list[tuple[Grade, float]]) -> None:
    paid = [row for row, (judged, _) in zip(ROWS, found, strict=True) if judged.correct and row.expected is False]
    assert paid == []
    slow = [(row, seconds) for row, (_, seconds) in zip(ROWS, found, strict=True) if seconds >= MAX_SECONDS]
    assert slow == []


def _in_turn() -> list[tuple[Grade, float]]:
    return [_timed(row) for row in ROWS]


def _in_eight_threads() -> list[tuple[Grade, float]]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(_timed, ROWS))


def _in_an_event_loop() -> list[tuple[Grade, float]]:
    async def main() -> list[tuple[Grade, float]]:
        limit = asyncio.Semaphore(8)

        async def one(row: Row) -> tuple[Grade, float]:
            async with limit:
                return await asyncio.to_thread(_timed, row)

        direct = [_timed(row) for row in ROWS[:5]]  # blocking calls inside the loop
        return direct + await asyncio.gather(*map(one, ROWS[5:]))

    return asyncio.run(main())


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("run", [_in_turn, _in_eight_threads, _in_an_event_loop])
def test_no_false_reward_no_exception_no_slow_call(run: Callable[[], list[tuple[Grade, float]]]) -> None:
    found = run()
    _check(found)
    if run is _in_turn:  # with others at once a right answer may have to wait for too long
        refused = [row for row, (judged, _) in zip(ROWS, found, strict=True) if row.expected and not judged.correct]
        assert refused == []


@pytest.mark.usefixtures("no_trace")
def test_a_batch_gives_the_verdicts_of_single_calls() -> None:
    judged = grade_many([(row.response, row.gold) for row in ROWS])
    _check([(one, 0.0) for one in judged])
    quick = [row for row, one in zip(ROWS, judged, strict=True) if one.verdict != "timeout"]
    assert len(quick) > 0.9 * len(ROWS)
    assert grade_many([(row.response, row.gold) for row in quick]) == [grade(row.response, row.gold) for row in quick]


def test_hostile_answers_do_not_starve_the_others(fresh_pool: Pool, tmp_path: Path) -> None:
    """Computations that never end, at the same time as honest ones that need a worker: all within five seconds."""
    script = tmp_path / "spin.py"
    script.write_text(
        "from rewards.math.worker import serve\n"
        "def compare(answer, gold):\n"
        "    while answer.startswith('x'): pass\n"
        "    return answer == '2^3'\n"
        "serve(lambda: compare)\n"
    )
    fresh_pool._command[1:] = ["-P", str(script)]
    rows = [Row(_boxed(f"x+{i}"), "8", None) for i in range(8)] + [Row(_boxed("2^3"), "8", None)]
    with ThreadPoolExecutor(9) as threads:
        found = list(threads.map(_timed, rows))
    assert {judged.verdict for judged, _ in found[:8]} == {"timeout"}
    assert found[8][0].verdict in ("correct", "timeout")
    assert max(seconds for _, seconds in found) < MAX_SECONDS
    assert grade(rows[8].response, "8").correct  # and the pool is whole


# -- limits on the input ---------------------------------------------------------------------------


def test_of_a_long_response_only_the_end_is_read() -> None:
    filler = "so it goes on and on\n" * 20_000
    assert grade(filler + _boxed("73"), "73").correct
    assert grade(f"<think>{filler}</think>{_boxed('73')}" + "\n" * 300_000, "73").correct
    assert grade(_boxed("73") + filler, "73", mode="boxed").verdict == "unparsed"
    assert grade(f"<think>{filler}{_boxed('73')}", "73").verdict == "unparsed"


def test_an_answer_too_long_for_a_worker_is_still_compared_as_text() -> None:
    long = "+".join(f"x_{{{n}}}" for n in range(1000))
    assert grade(_boxed(long), long).correct
    assert grade(_boxed(long), long + "+0").verdict == "wrong"


def test_a_tiny_time_limit_is_a_timeout_and_not_an_error(fresh_pool: Pool) -> None:
    assert grade(_boxed("x+1"), "1+x", timeout_s=0).verdict == "timeout"
    assert grade(_boxed("73"), "73", timeout_s=0).correct  # decided at once
    assert grade(_boxed("x+1"), "1+x", timeout_s=60).correct
