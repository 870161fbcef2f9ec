"""Generated problems are checked by solvers that see only the statement and share no code with it."""

import ast
import hashlib
import math
import operator
import re
import string
from collections import Counter

import pytest

from data import ALPHABET, DataError, GeneratorSpec, generate, normalise_statement
from data.families import FAMILIES

CASES = [(family, level) for family in FAMILIES for level in range(1, 6)]
# The table of `generate`'s docstring.
LONGEST = {
    "addition": [19, 19, 29, 39, 49],
    "chain": [14, 22, 41, 52, 63],
    "modular": [24, 29, 32, 37, 43],
    "linear": [19, 21, 28, 37, 42],
    "gcd": [25, 37, 52, 70, 97],
    "digits": [6, 15, 26, 54, 90],
    "word": [8, 17, 33, 44, 56],
    "counting": [8, 26, 38, 48, 108],
}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def solve_addition(statement: str) -> int:
    a, b = numbers(statement)
    return a + b


def solve_chain(statement: str) -> int:
    value = int(re.match(r"start (\d+);", statement)[1])  # type: ignore[index]
    for op, n in re.findall(r"([-+*])(\d+)", statement):
        value = {"+": value + int(n), "-": value - int(n), "*": value * int(n)}[op]
        assert value >= 0
    return value


def solve_modular(statement: str) -> int:
    a, b, c, m = numbers(statement)
    return sum((a % m for _ in range(b)), c) % m  # the product as a repeated sum


def solve_linear(statement: str) -> int:
    left, right = statement.removesuffix(", x=?").split("=")

    def value(side: str, x: int) -> int:
        terms = re.findall(r"([-+]?)(\d+)(x?)", side)
        return sum((-1 if sign == "-" else 1) * int(n) * (x if has_x else 1) for sign, n, has_x in terms)

    roots = [x for x in range(-200, 201) if value(left, x) == value(right, x)]
    assert len(roots) == 1
    return roots[0]


def solve_gcd(statement: str) -> int:
    return max(d for d in range(1, min(numbers(statement)) + 1) if all(n % d == 0 for n in numbers(statement)))


def solve_digits(statement: str) -> int:
    digits = [int(c) for c in statement if c.isdigit()]
    return sum(digits) if "sum" in statement else math.prod(digits)


def solve_word(statement: str) -> int:
    value = 0
    owner = statement.split()[0]
    for sentence in re.split(r"(?<=[.?]) ", statement):
        n = numbers(sentence)
        if re.search(r"boxes of|a day for", sentence):
            value = n[0] * n[1]
        elif re.search(r" has \d", sentence):
            value = n[0]
        elif "doubles" in sentence:
            value += value
        elif "shared equally" in sentence:
            assert value % n[0] == 0
            value //= n[0]
        elif re.search(rf"^{owner} (gives|loses|sells)", sentence):
            value -= n[0]
            assert value > 0
        elif re.search(rf"^{owner} (buys|finds)|gives {owner}", sentence):
            value += n[0]
        else:
            assert sentence.startswith("How many") and not n, sentence
    return value


def solve_counting(statement: str) -> int:
    *divisors, low, high = numbers(statement)
    return sum(any(k % d == 0 for d in divisors) for k in range(low, high + 1))


SOLVERS = {
    "addition": solve_addition,
    "chain": solve_chain,
    "modular": solve_modular,
    "linear": solve_linear,
    "gcd": solve_gcd,
    "digits": solve_digits,
    "word": solve_word,
    "counting": solve_counting,
}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def arithmetic(node: ast.AST) -> float:
    if isinstance(node, ast.BinOp):
        return float(OPERATORS[type(node.op)](arithmetic(node.left), arithmetic(node.right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -arithmetic(node.operand)
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return float(node.value)


@pytest.mark.parametrize(("family", "level"), CASES)
def test_answers_and_working_are_right(family: str, level: int) -> None:
    for problem in generate(GeneratorSpec(families=[family], levels=[level], count=150, seed=level)):
        statement, reasoning, answer = problem["problem"], problem["reasoning"], problem["answer"]
        assert (problem["family"], problem["level"]) == (family, level)
        assert int(answer) == SOLVERS[family](statement) and str(int(answer)) == answer, statement
        assert re.findall(r"-?\d+$", reasoning.replace("+", " "))[-1] == answer, problem
        for step in reasoning.split(";"):
            sides = [side for side in step.split("=") if "x" not in side]
            assert len({arithmetic(ast.parse(side, mode="eval").body) for side in sides}) == 1, step


@pytest.mark.parametrize(("family", "level"), CASES)
def test_reasoning_is_as_short_as_documented(family: str, level: int) -> None:
    problems = generate(GeneratorSpec(families=[family], levels=[level], count=160))
    longest = max(len(problem["reasoning"]) for problem in problems)
    documented = LONGEST[family][level - 1]
    assert documented * 0.6 <= longest <= documented
    assert level > 2 or documented <= 60


def test_the_documented_lengths_are_these() -> None:
    rows = re.findall(r"^ *([a-z]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", generate.__doc__ or "", re.MULTILINE)
    assert {family: [int(n) for n in lengths] for family, *lengths in rows} == LONGEST


def test_alphabet_is_what_occurs() -> None:
    problems = generate(GeneratorSpec(levels=[1, 2, 3, 4, 5], count=4000))
    used = {c for p in problems for key in ("problem", "reasoning", "answer") for c in p[key]}
    assert used <= set(ALPHABET) and len(ALPHABET) == len(set(ALPHABET))
    assert set(ALPHABET) - used <= set(string.ascii_letters)
    assert all(c.isascii() and c.isprintable() for c in ALPHABET)


def test_same_seed_same_problems_and_a_smaller_count_is_a_prefix() -> None:
    spec = GeneratorSpec(levels=[1, 2], count=300, seed=5)
    assert generate(spec) == generate(spec)
    assert generate(spec)[:100] == generate(spec.model_copy(update={"count": 100}))
    other = generate(spec.model_copy(update={"seed": 6}))
    assert [p["problem"] for p in other] != [p["problem"] for p in generate(spec)]


def test_generator_is_the_same_on_every_machine() -> None:
    problems = generate(GeneratorSpec(levels=[1, 2, 3, 4, 5], count=200, seed=7))
    text = "\n".join(f"{p['problem']}|{p['reasoning']}|{p['answer']}" for p in problems)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e4ed8b829e216880"


def test_families_and_levels_are_drawn_evenly_without_duplicates() -> None:
    problems = generate(GeneratorSpec(levels=[2, 3], count=1600))
    assert len({normalise_statement(p["problem"]) for p in problems}) == 1600
    counts = Counter((p["family"], p["level"]) for p in problems)
    assert len(counts) == 16 and min(counts.values()) > 60


def test_a_whole_family_can_be_listed_and_no_more() -> None:
    for seed in range(4):  # the last of the 100 * 10 sums can take thousands of draws to come up
        spec = GeneratorSpec(families=["addition"], levels=[1], count=1000, seed=seed)
        assert len(generate(spec)) == 1000
    everything = GeneratorSpec(families=["digits"], levels=[1], count=162)  # 9 * 9 numbers, sum and product
    assert len(generate(everything)) == 162
    message = r"163 problems asked for, but only 162 distinct ones were found in \d+ attempts for digits"
    with pytest.raises(DataError, match=message):
        generate(everything.model_copy(update={"count": 163}))


def test_a_fallible_teacher_slips_as_often_as_asked():
    """The gold answer never changes; a solution is wrong where a column slipped, and says what it ends in."""
    exact = generate(GeneratorSpec(families=["addition"], levels=[2], count=1500, seed=4))
    fallible = generate(GeneratorSpec(families=["addition"], levels=[2], count=1500, seed=4, slips=0.3))
    assert [row["answer"] for row in exact] == [row["answer"] for row in fallible]
    columns = slipped = 0
    for row in fallible:
        *steps, final = row["reasoning"].split(";")
        assert final == row["solution_answer"]
        wrong = [sum(map(int, left.split("+"))) + 1 == int(right) for left, right in (s.split("=") for s in steps)]
        assert (row["solution_answer"] == row["answer"]) == (not any(wrong))
        columns, slipped = columns + len(steps), slipped + sum(wrong)
    assert abs(slipped / columns - 0.3) < 0.03
    assert all(
        row["solution_answer"] == row["answer"]
        for row in generate(GeneratorSpec(families=["addition"], levels=[3], count=200, slips=0.0))
    )
    with pytest.raises(ValueError, match="only solutions of the family addition"):
        GeneratorSpec(families=["chain"], slips=0.1)
