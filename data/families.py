"""The families of synthetic problems: one short function each, from a random stream and a level to a problem.

Every answer is an integer, every statement is printable ASCII, and the reasoning is the shortest honest
working, steps separated by ";", because a model of a million parameters has to write it on a CPU.
"""

from collections.abc import Callable
from math import lcm
from random import Random
from typing import NamedTuple


class Draft(NamedTuple):
    """One problem: its statement, what goes inside <think>, and the exact answer."""

    statement: str
    reasoning: str
    answer: int


def addition(rng: Random, level: int) -> Draft:
    """347+85=? worked column by column from the right; a carry is the third term of the next column."""
    low, high = [(0, 9), (10, 99), (100, 999), (1000, 9999), (10000, 99999)][level - 1]
    a, b = rng.randint(0, max(high, 99)), rng.randint(low, high)
    working, total = work_addition(a, b)
    return Draft(f"{a}+{b}=?", working, total)


def work_addition(a: int, b: int, slip: Callable[[], bool] = lambda: False) -> tuple[str, int]:
    """(working, result) column by column. Where `slip()` says so, a column's sum comes out one too many."""
    steps, carry, result = [], 0, 0
    columns = max(len(str(a)), len(str(b)))
    for column in range(columns):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        total += total < 19 and slip()
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
        result += total % 10 * 10**column
    result += carry * 10**columns
    return ";".join([*steps, str(result)]), result


def chain(rng: Random, level: int) -> Draft:
    """start 3; +4; *2; -5; end? A chain of level + 1 operations from left to right, never below zero."""
    top, largest = (99, 9) if level <= 2 else (999, 99)
    start = value = rng.randint(1, 9)
    operations, steps = [], []
    for _ in range(level + 1):
        choices = [(op, n) for op, n in (("+", rng.randint(1, largest)), ("-", rng.randint(1, largest)),
                   ("*", rng.randint(2, 9))) if 0 <= _apply(value, op, n) <= top]  # fmt: skip
        # Every draw may fail (90 can be out of reach of all three): a step of one never does.
        op, n = rng.choice(choices) if choices else ("-", 1) if value else ("+", 1)
        result = _apply(value, op, n)
        operations.append(f"{op}{n}")
        steps.append(f"{value}{op}{n}={result}")
        value = result
    return Draft(f"start {start}; {'; '.join(operations)}; end?", ";".join(steps), value)


def _apply(value: int, op: str, n: int) -> int:
    return value + n if op == "+" else value - n if op == "-" else value * n


def modular(rng: Random, level: int) -> Draft:
    """(17*23+9) mod 7"""
    a_range, b_range, modulus = [
        ((2, 9), (2, 9), 9), ((10, 19), (2, 9), 9), ((10, 29), (10, 29), 19), ((10, 99), (10, 99), 29),
        ((100, 999), (10, 99), 99),
    ][level - 1]  # fmt: skip
    a, b, c, m = rng.randint(*a_range), rng.randint(*b_range), rng.randint(1, 9), rng.randint(2, modulus)
    total = a * b + c
    working = f"{a}*{b}={a * b};{a * b}+{c}={total};{total}={total // m}*{m}+{total % m}"
    return Draft(f"({a}*{b}+{c}) mod {m}", working, total % m)


def linear(rng: Random, level: int) -> Draft:
    """7x+12=61, x=? From level 3 with negative numbers, from level 4 with x on both sides."""
    reach = [9, 9, 20, 20, 99][level - 1]
    x = rng.randint(1 if level <= 2 else -reach, reach)
    a = rng.randint(2, [5, 9, 9, 12, 30][level - 1])
    b = rng.randint(1, [9, 50, 50, 99, 999][level - 1]) * (1 if level == 1 else rng.choice((1, -1)))
    if level <= 3:
        c = a * x + b
        working = f"{a}x={c}{-b:+}={c - b};x={c - b}/{a}={x}"
        return Draft(f"{a}x{b:+}={c}, x=?", working, x)
    k = rng.randint(1, a - 1)  # smaller than a: the coefficient that is left stays positive
    d = (a - k) * x + b
    working = f"{a}x-{k}x={d}{-b:+};{a - k}x={d - b};x={d - b}/{a - k}={x}"
    return Draft(f"{a}x{b:+}={k}x{d:+}, x=?", working, x)


def greatest_common_divisor(rng: Random, level: int) -> Draft:
    """gcd(84,36)=? by Euclid's steps, at most level + 2 of them."""
    top = [30, 99, 299, 999, 9999][level - 1]
    while True:
        factor = rng.randint(1, top // 6)
        a, b = factor * rng.randint(2, top // factor), factor * rng.randint(2, top // factor)
        steps, x, y = [], max(a, b), min(a, b)
        while y:
            steps.append(f"{x}%{y}={x % y}")
            x, y = y, x % y
        if a != b and len(steps) <= level + 2:
            return Draft(f"gcd({a},{b})=?", ";".join([*steps, str(x)]), x)


def digits(rng: Random, level: int) -> Draft:
    """digit sum of 4821? or digit product of 4821?"""
    length = [2, 3, 4, 6, 8][level - 1]
    name, op = rng.choice((("sum", "+"), ("product", "*")))
    number = [rng.randint(1, 9) for _ in range(length)]
    value, steps = number[0], []
    for digit in number[1:]:
        result = _apply(value, op, digit)
        steps.append(f"{value}{op}{digit}={result}")
        value = result
    return Draft(f"digit {name} of {''.join(map(str, number))}?", ";".join(steps), value)


def word(rng: Random, level: int) -> Draft:
    """A little story of `level` steps: somebody has, earns or packs things, and then things happen."""
    name, friend = rng.sample(("Ann", "Ben", "Eva", "Tom", "Mia", "Leo", "Zoe", "Max"), 2)
    thing = rng.choice(("apples", "pens", "coins", "cards", "books", "shells", "stamps"))
    steps: list[str] = []
    if rng.random() < 0.5:
        value = rng.randint(5, 30 if level <= 2 else 200)
        story = [f"{name} has {value} {thing}."]
    else:
        n, each = rng.randint(2, 9), rng.randint(2, 9 if level <= 2 else 20)
        value = n * each
        steps.append(f"{n}*{each}={value}")
        story = [rng.choice((f"{name} has {n} boxes of {each} {thing}.",
                             f"{name} gets {each} {thing} a day for {n} days."))]  # fmt: skip
    question = f"How many {thing} has {name} now?"
    while len(steps) < level:
        event = rng.choice(("gain", "gain", "lose", "lose", "double", "share"))
        sharers = [n for n in range(2, 10) if value % n == 0]
        if event == "share" and len(steps) == level - 1 and value and sharers:  # only the end is shared out
            n = rng.choice(sharers)
            text, op = f"They are shared equally by {n} friends.", "/"
            result, question = value // n, f"How many {thing} does each friend get?"
        elif event == "double" and 0 < value < 100:
            n, op, result = 2, "*", value * 2
            text = f"Then {name} doubles the number of {thing}."
        elif event == "lose" and value > 1:
            n = rng.randint(1, value - 1)
            op, result = "-", value - n
            text = rng.choice((f"{name} gives {n} to {friend}.", f"{name} loses {n}.", f"{name} sells {n}."))
        else:
            n = rng.randint(2, 20 if level <= 2 else 99)
            op, result = "+", value + n
            text = rng.choice((f"{name} buys {n} more.", f"{name} finds {n} more.",
                               f"{friend} gives {name} {n} more."))  # fmt: skip
        story.append(text)
        steps.append(f"{value}{op}{n}={result}")
        value = result
    return Draft(" ".join([*story, question]), ";".join(steps), value)


def counting(rng: Random, level: int) -> Draft:
    """Multiples in a range; from level 3 of two numbers, at level 5 of three, by inclusion and exclusion."""
    if level <= 2:
        a, low = rng.randint(2, 12), 1 if level == 1 else rng.randint(2, 40)
        high = low + rng.randint(10, 59)
        count, before = high // a, (low - 1) // a
        tail = f";{low - 1}//{a}={before};{count}-{before}={count - before}" if level == 2 else ""
        return Draft(f"How many multiples of {a} in {low}..{high}?", f"{high}//{a}={count}{tail}", count - before)
    n = rng.randint(20, [99, 999, 999][level - 3])
    numbers = sorted(rng.sample(range(2, 13), 3 if level == 5 else 2))
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
    divisors = [(1, a) for a in numbers] + [(-1, lcm(*pair)) for pair in pairs]
    if level == 5:
        divisors.append((1, lcm(*numbers)))
    counts = [n // d for _, d in divisors]
    signed = "".join(f"{'+' if sign > 0 else '-'}{c}" for (sign, _), c in zip(divisors, counts, strict=True))
    total = sum(sign * c for (sign, _), c in zip(divisors, counts, strict=True))
    working = ";".join(f"{n}//{d}={c}" for (_, d), c in zip(divisors, counts, strict=True))
    named = f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
    return Draft(f"How many multiples of {named} in 1..{n}?", f"{working};{signed[1:]}={total}", total)


FAMILIES: dict[str, Callable[[Random, int], Draft]] = {
    "addition": addition,
    "chain": chain,
    "modular": modular,
    "linear": linear,
    "gcd": greatest_common_divisor,
    "digits": digits,
    "word": word,
    "counting": counting,
}
