"""The math verifier against math-verify: speed on integers, on mixed completions, and agreement on known cases.

    python benchmarks/verifier.py [--data FOLDER] [--agreement FOLDER] [--repeats 5] [--json OUT]

Both engines run in one environment (`pip install -e '.[bench]'`) and turn about, so that a machine that slows
down slows both. math-verify keeps its time limits, as a training run must.

Integers: time per call where both answers are integers, ours being compared without a worker process.
Mixed: completions of which about 70 % answer with an integer, the rest with other kinds, in several spellings,
right and wrong in turn; `grade_many` as a whole (with the start of the workers), then call by call.
--data FOLDER adds the rows of its .jsonl files (fields pred, gold, expected) to them.
--agreement FOLDER counts, per .jsonl file, the rows on which each engine gives the expected verdict, math-verify
in the setting that is best for that file. Rows with expected null or SPECIAL in their note set no verdict, and
neither does adversarial.jsonl, which is for robustness.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import common

Case = tuple[str, str, bool]  # response, gold, whether they are equal

REASONING = (
    "Let us go through it step by step. There are {} of the first kind and {} of the second, so we add them "
    "and take away what was counted twice. Checking the smaller cases gives the same pattern. "
)


# -- engines ---------------------------------------------------------------------------------------


def ours(response: str, gold: str) -> bool:
    from rewards.math import grade

    return grade(response, gold).correct


def theirs(response: str, gold: str) -> bool:
    """As its documentation shows it: the gold is put between dollars so that it is read as LaTeX."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(response)))


ENGINES = {"r1forge": ours, "math-verify": theirs}


# -- cases -----------------------------------------------------------------------------------------


def integer_cases(count: int, rng: random.Random) -> list[Case]:
    spellings = ("{}", "{}.0", "{:,}", "x = {}", r"\text{{{}}}", "{}^\\circ")
    cases = []
    for i in range(count):
        gold = rng.randrange(1000 if i % 2 else 10**6)
        right = rng.random() < 0.6
        answer = spellings[i % len(spellings)].format(gold if right else gold + rng.randrange(1, 9))
        cases.append((_response(answer, rng), str(gold), right))
    return cases


def other_cases(count: int, rng: random.Random) -> list[Case]:
    """Radicals, polynomials, intervals, sets, matrices and constants, each in another spelling than its gold."""
    cases = []
    for i in range(count):
        a, b, c = rng.randrange(2, 40), rng.randrange(2, 40), rng.randrange(2, 40)
        right = rng.random() < 0.6
        d = b if right else b + 1
        gold, answer = (
            (rf"\frac{{{a} + \sqrt{{{b * c * c}}}}}{{{c}}}", rf"\frac{{{a}}}{{{c}}} + \sqrt{{{d}}}"),
            (f"(x+{a})(x-{b})", f"x^2 + {a - b}x - {a * d}".replace("+ -", "- ")),
            (rf"\left[-{a}, \frac{{{b}}}{{{c}}}\right)", rf"[-{a}, \frac{{{2 * d}}}{{{2 * c}}})"),
            (rf"\{{{a}, {a + b}, {a + 100}\}}", rf"\{{{a + 100}, {a}, {a + d}\}}"),
            (rf"\begin{{pmatrix}}{a} & {b}\\ 0 & {c}\end{{pmatrix}}",
             rf"\begin{{bmatrix}} {a} & {d} \\ 0 & {c} \end{{bmatrix}}"),
            (rf"\frac{{{b}\pi}}{{{a}}}", rf"\frac{{{d}}}{{{a}}} \pi"),
            (f"y = {a}x + {b}", f"y = {d} + {a}x"),
        )[i % 7]  # fmt: skip
        cases.append((_response(answer, rng), gold, right))
    return cases


def _response(answer: str, rng: random.Random) -> str:
    steps = " ".join(REASONING.format(rng.randrange(99), rng.randrange(99)) for _ in range(rng.randrange(1, 6)))
    return f"<think>\n{steps}\n</think>\n\n{steps}\n\nThe final answer is $\\boxed{{{answer}}}$."


def rows(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) of every row that sets a verdict."""
    for file in sorted(Path(folder).glob("*.jsonl")):
        if file.stem != "adversarial":
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["expected"] is not None and "SPECIAL" not in row.get("note", ""):
                    yield file.stem, row


def mixed_cases(count: int, data: str | None, rng: random.Random) -> list[Case]:
    others = [(row["pred"], row["gold"], row["expected"]) for _, row in rows(data)] if data else []
    others = others[: int(0.3 * count)]
    others += other_cases(int(0.3 * count) - len(others), rng)
    cases = others + integer_cases(count - len(others), rng)
    rng.shuffle(cases)
    return cases


# -- measurements, each in a process of its own ----------------------------------------------------


def measure_integers(settings: dict[str, Any]) -> dict[str, Any]:
    """Microseconds per call of each engine in each round."""
    cases = integer_cases(settings["integers"], random.Random(0))
    for engine in ENGINES.values():
        engine(*cases[0][:2])
    found: dict[str, Any] = {name: {"us": [], "as_built": 0} for name in ENGINES}
    for _ in range(settings["repeats"]):
        for name, engine in ENGINES.items():
            start = time.perf_counter()
            equal = [engine(response, gold) for response, gold, _ in cases]
            found[name]["us"].append((time.perf_counter() - start) / len(cases) * 1e6)
            found[name]["as_built"] = sum(e == right for e, (_, _, right) in zip(equal, cases, strict=True))
    return found


def measure_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all mixed cases: `grade_many`, and math-verify's calls one after the other."""
    from rewards.math import grade_many

    cases = mixed_cases(settings["cases"], settings["data"], random.Random(1))
    start = time.perf_counter()
    grades = grade_many([(response, gold) for response, gold, _ in cases])
    middle = time.perf_counter()
    equal = [theirs(response, gold) for response, gold, _ in cases]
    end = time.perf_counter()
    rights = [right for _, _, right in cases]
    return {
        "r1forge": {
            "seconds": middle - start,
            "as_built": sum(g.correct == right for g, right in zip(grades, rights, strict=True)),
            "timeouts": sum(g.verdict == "timeout" for g in grades),
        },
        "math-verify": {
            "seconds": end - middle,
            "as_built": sum(e == right for e, right in zip(equal, rights, strict=True)),
        },
    }


def measure_calls(settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each single call on the mixed cases, the engines in turn on each pair."""
    found: dict[str, list[float]] = {name: [] for name in ENGINES}
    for engine in ENGINES.values():
        engine(r"\boxed{x+1}", "1+x")
    for response, gold, _ in mixed_cases(settings["cases"], settings["data"], random.Random(1)):
        for name, engine in ENGINES.items():
            start = time.perf_counter()
            engine(response, gold)
            found[name].append((time.perf_counter() - start) * 1e3)
    return {name: _percentiles(times) for name, times in found.items()}


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": median(ordered), "p99": ordered[int(0.99 * (len(ordered) - 1))], "max": ordered[-1]}


def measure_agreement(settings: dict[str, Any]) -> dict[str, Any]:
    from rewards.math import grade

    files: dict[str, dict[str, Any]] = {}
    for name, row in rows(settings["agreement"]):
        entry = files.setdefault(name, {"rows": 0, "r1forge": 0, "math-verify": {}, "disagreements": []})
        entry["rows"] += 1
        judged = grade(row["pred"], row["gold"])
        if judged.correct == row["expected"]:
            entry["r1forge"] += 1
        else:
            kept = {key: row.get(key, "") for key in ("gold", "pred", "expected", "note")}
            entry["disagreements"].append({**kept, "verdict": judged.verdict, "extracted": judged.extracted})
        for setting, equal in _in_every_setting(row["pred"], row["gold"]).items():
            agreed = entry["math-verify"].setdefault(setting, 0)
            entry["math-verify"][setting] = agreed + (equal == row["expected"])
    return files


def _in_every_setting(response: str, gold: str) -> dict[str, bool]:
    """math-verify's verdict for each way of handing over the texts, extracting and comparing."""
    from math_verify import verify

    wrappers = {"as is": "{}", "dollars": "${}$", "boxed": r"\boxed{{{}}}"}
    found = {}
    for gold_as, response_as, extraction in product(wrappers, ("as is", "dollars"), ("default", "boxed first")):
        sides = (
            _parsed(wrappers[gold_as].format(gold), extraction),
            _parsed(wrappers[response_as].format(response), extraction),
        )
        for strict in (True, False):
            setting = f"gold {gold_as}, response {response_as}, {extraction}, {'strict' if strict else 'not strict'}"
            found[setting] = bool(verify(*sides, strict=strict, allow_set_relation_comp=not strict))
    return found


@cache
def _parsed(text: str, extraction: str) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if extraction == "default":
        return parse(text)
    return parse(text, extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


TASKS = {
    "integers": measure_integers,
    "batch": measure_batch,
    "calls": measure_calls,
    "agreement": measure_agreement,
}


# -- report ----------------------------------------------------------------------------------------


def report_speed(found: dict[str, Any]) -> str:
    integers, batch, calls = found["integers"], found["batch"], found["calls"]
    columns = ["engine", "integer, µs per call", "batch, s", "as built", "p50, ms", "p99, ms", "max, ms"]
    lines = [
        [name, f"{median(integers[name]['us']):.1f}", f"{batch[name]['seconds']:.2f}", str(batch[name]["as_built"])]
        + [f"{calls[name][key]:.3f}" for key in ("p50", "p99", "max")]
        for name in ENGINES
    ]
    ratio = median(integers["math-verify"]["us"]) / median(integers["r1forge"]["us"])
    return (
        common.markdown_table(columns, lines)
        + f"\n\nIntegers: r1forge is {ratio:.0f} times as fast per call (medians). "
        + f"Batch: {batch['r1forge']['timeouts']} of our comparisons exceeded their limits."
    )


def report_agreement(files: dict[str, Any]) -> str:
    lines = []
    for name, entry in files.items():
        setting, best = max(entry["math-verify"].items(), key=lambda item: item[1])
        lines.append([name, str(entry["rows"]), str(entry["r1forge"]), str(best), setting])
    sums = [str(sum(int(line[i]) for line in lines)) for i in (1, 2, 3)]
    lines.append(["all", *sums, "best per file"])
    table = common.markdown_table(["file", "rows", "r1forge", "math-verify", "its best setting"], lines)
    listed = [
        f"- {name}: gold `{_short(row['gold'])}`, response `{_short(row['pred'])}`, "
        f"expected {'equal' if row['expected'] else 'different'}, we say {row['verdict']}"
        for name, entry in files.items()
        for row in entry["disagreements"]
    ]
    return table + "\n\nWhere r1forge gives another verdict than the file expects:\n\n" + "\n".join(listed or ["none"])


def _short(text: str, length: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length // 2] + " … " + text[-length // 2 :]


def main(arguments: argparse.Namespace) -> None:
    settings = {k: getattr(arguments, k) for k in ("integers", "cases", "repeats", "data", "agreement", "threads")}
    settings["model"] = ""
    found = {}
    for task in TASKS:
        if task != "agreement" or arguments.agreement:
            found[task] = common.run_worker(__file__, {**settings, "task": task})
    machine = {
        **common.machine(arguments.threads),
        **{name: version(name) for name in ("sympy", "math-verify")},
    }
    print(
        f"{arguments.integers} integer answers, {arguments.cases} mixed completions; {machine['cpu']}, "
        f"{common.cores()} cores, math-verify {machine['math-verify']}, sympy {machine['sympy']}\n"
    )
    print(report_speed(found))
    if arguments.agreement:
        print("\n" + report_agreement(found["agreement"]))
    common.write_json(arguments.json, {"settings": settings, "machine": machine, **found})


if __name__ == "__main__":
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--integers", type=int, default=2000, help="pairs of integers in each round")
    parser.add_argument("--cases", type=int, default=5000, help="mixed completions")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over the integers")
    parser.add_argument("--data", metavar="FOLDER", help="rows to add to the mixed completions")
    parser.add_argument("--agreement", metavar="FOLDER", help="rows with known verdicts")
    parser.add_argument("--json", metavar="OUT", help="also write every number here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.threads = 1
    if given.worker:
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports every text that it cannot read
        task = json.loads(Path(given.worker).read_text())
        Path(task["result"]).write_text(json.dumps(TASKS[task["task"]](task)))
    else:
        main(given)
