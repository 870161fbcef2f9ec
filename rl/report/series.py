"""Lines of metrics as series over steps: picked by pattern, thinned to what a figure can show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl.report.read import number

POINTS = 500  # of a curve; longer ones are averaged over neighbouring steps
Values = list[float | None]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names equal to the pattern, or, if it ends in `*`, that begin with it; layers and drafts in order of number."""
    if not pattern.endswith("*"):
        return [name for name in names if name == pattern]
    return sorted((name for name in names if name.startswith(pattern[:-1])), key=_natural)


def column(lines: Sequence[Mapping[str, Any]], name: str) -> Values:
    return [number(line.get(name)) for line in lines]


def bins(length: int, points: int = POINTS) -> list[range]:
    """Neighbouring places to be shown as one point: at most `points` of them, of one size but for the last."""
    size = max(1, math.ceil(length / points))
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def thinned(values: Values, places: Sequence[range], peak: bool = False) -> Values:
    """The mean of each bin (or its largest value), rounded to six digits; None where it holds nothing."""
    result: Values = []
    for places_of_bin in places:
        found = [value for i in places_of_bin if (value := values[i]) is not None]
        mean = (max(found) if peak else math.fsum(found) / len(found)) if found else None
        result.append(None if mean is None else float(f"{mean:.6g}"))
    return result


def with_speeds(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with tokens per second, and the step's time in phases that add up to it."""
    get = {name: number(value) for name, value in line.items()}
    sampled = _product(get.get("completions"), get.get("length/mean"))
    phases = {name.removeprefix("time/"): value for name, value in get.items() if name.startswith("time/")}
    whole, rollout, reward = phases.pop("step", None), phases.get("rollout"), phases.pop("reward", None)
    beside = "wait" in phases  # the rollout ran beside the training: it is no phase of the step, waiting for it is
    train = phases.get("train") or whole  # supervised training has no phases
    speeds = {
        "speed/sampled": _ratio(sampled, rollout),
        "speed/trained": _ratio(get.get("tokens_trained"), train),
    }
    if rollout is not None:
        if beside:
            speeds["beside/rollout"] = phases.pop("rollout")
        elif reward is not None:
            phases |= {"rollout": rollout - reward, "reward": reward}
        if whole is not None:
            phases["other"] = max(0.0, whole - math.fsum(value for value in phases.values() if value is not None))
        speeds |= {f"phase/{name}": value for name, value in phases.items()}
    return {**line, **{name: value for name, value in speeds.items() if value is not None}}


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
