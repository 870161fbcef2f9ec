"""Symbolic comparison of what is large or deep: cheap, whatever the verdict."""

import time

import pytest

from rewards.math.symbolic import symbolically_equal

HOSTILE = [
    "2^{10^9}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "9^{9^{9^{9}}}",
    "1000000!",
    "(10^6)!!",
    "((5!)!)!",
    r"\binom{10^{9}}{5\cdot 10^{8}}",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k^2}",
    r"\prod_{k=1}^{10^9} k",
    r"\int_0^{10^9} \frac{\sin(x^{x})}{x} dx",
    "2^{1000000007}-1",
    "(x+1)^{100000}",
    "(x+y+z+w+1)^{40}",
    "((x+1)^{40}+1)^{40}",
    "(((x+y)^{30}+z)^{30}+1)^{30}",
    r"10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}",
    "\\sqrt{" * 400 + "2" + "}" * 400,
    "\\sqrt{2+" * 30 + "2" + "}" * 30,
    "(" * 3000 + "73" + ")" * 3000,
    "{" * 3000 + "73" + "}" * 3000,
    "1" * 100_000,
    "0." + "3" * 5000,
    "x" * 9_000,
    "1," * 4_000 + "1",
    "+" * 5_000 + "1",
    r"\pm" * 2_000 + "1",
    r"\frac" * 3_000,
    "x=" * 3_000 + "1",
    r"\sin(" * 30 + "x" + ")" * 30,
    "e^{e^{e^{e^{e^{e}}}}}",
    r"\sin(10^{10^{6}})",
    r"\ln(" * 30 + "2" + ")" * 30,
    r"0.5^{0.5^{0.5^{0.5}}}",
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 60)),
    "+".join(rf"\sqrt[{n}]{{{n}}}" for n in range(2, 20)),
    "(1+i)^{100000}",
    r"\pi^{10000000}",
    r"\begin{vmatrix}" + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(12)) for i in range(12)) + r"\end{vmatrix}",
    r"\begin{pmatrix}" + r"\\".join("&".join(str(i + j) for j in range(40)) for i in range(40)) + r"\end{pmatrix}",
    r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(2, 200)) + r"\}",
    r"x^{20}+x+1>0",
    "<".join(["x"] * 40),
    r"\lfloor 10^{5000} \rfloor",
    r"\gcd(10^{4000}, 7^{4000})",
    r"\sin^{1000}x+\cos^{1000}x",
    "|" * 2_000 + "x",
    r"1,000" * 1_500,
    r"\overline{" * 500 + "3" + "}" * 500,
    r"\boxed{" * 500 + "73" + "}" * 500,
    "((((2^2)^2^2)^2^2^2)^2)^{2^2^2^2}",
    r"123456789^{x}-10^{12}",
    r"\{x : x^6 - 3x^5 + x - 1 < 0\}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_hostile_sizes_are_cheap(text: str) -> None:
    symbolically_equal("1", "2")  # imports
    start = time.process_time()
    assert not symbolically_equal(text, "72")
    assert not symbolically_equal("x+72", text)
    symbolically_equal(text, text + " + 1")
    assert time.process_time() - start < 5  # a tenth of a second on a quiet machine; what blows up takes minutes


def test_large_lists_and_matrices_are_compared() -> None:
    numbers = [rf"\sqrt{{{n}}}" for n in range(2, 200)]
    assert symbolically_equal(",".join(numbers), r"\{" + ",".join(reversed(numbers)) + r"\}")
    assert not symbolically_equal(",".join(numbers), ",".join([*numbers[:-1], r"\sqrt{201}"]))
