"""Which figures a run has: a plan of metrics to each, and what is left over. A figure without data is left out.

Figures are plain data; `assets/charts.js` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from rewards.compose import VERDICTS
from rl.report.read import Evaluation, RunData, number
from rl.report.series import POINTS, Values, bins, column, matching, thinned, with_speeds

Kind = Literal["lines", "stack", "heat"]
Unit = Literal["number", "share", "count", "seconds"]
GROUPS = ("Learning", "Completions", "Updates", "Experts", "Speed", "Other")
_MANY = 8  # lines that can be told apart by colour; more layers than that become a heat map
_COLUMNS = 100  # of a heat map over steps


@dataclass(frozen=True)
class Series:
    name: str
    y: Values
    error: Values | None = None  # standard errors


@dataclass(frozen=True)
class Figure:
    """x and series for `lines` and `stack`; for `heat` rows are the series and x names the columns."""

    group: str
    title: str
    kind: Kind
    unit: Unit
    x: list[int]
    series: list[Series]
    x_label: str = "step"
    note: str = ""
    log: bool = False

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Plan(NamedTuple):
    group: str
    title: str
    metrics: tuple[str, ...]  # `name`, or `prefix/*`
    unit: Unit = "number"
    kind: Kind = "lines"
    log: bool = False
    zeros: bool = True  # whether a series of nothing but zeros is worth a line
    note: str = ""


PHASES = tuple(f"phase/{name}" for name in ("wait", "rollout", "reward", "old_logprobs", "train", "sync"))
PLANS = (
    Plan("Learning", "Reward", ("reward", "reward/*"), note="weighted total; components unweighted"),
    Plan("Learning", "Reward deviation", ("reward_std",), note="over completions"),
    Plan("Learning", "Informative groups", ("groups/informative",), "share", note="groups of unequal rewards"),
    Plan("Learning", "Groups resampled", ("groups/resampled",), "count", zeros=False, note="by dynamic sampling"),
    Plan("Learning", "Loss", ("loss",), note="nats per completion token"),
    Plan("Learning", "Loss of the prediction modules", ("mtp_loss",), note="nats per token, without λ"),
    Plan("Learning", "Gradient norm", ("grad_norm",), note="before clipping"),
    Plan("Learning", "Learning rate", ("learning_rate",)),
    Plan("Learning", "Updates skipped", ("updates_skipped",), "count", zeros=False, note="gradient not finite"),
    Plan(
        "Completions",
        "Verdicts",
        tuple(f"verdict/{verdict}" for verdict in VERDICTS),
        "count",
        "stack",
        zeros=False,
        note="completions",
    ),
    Plan("Completions", "Rewards that did not apply", ("none/*",), "count", zeros=False, note="completions"),
    Plan("Completions", "Length", ("length/mean", "length/max"), note="tokens"),
    Plan("Completions", "Truncated", ("length/truncated",), "share", note="completions that hit the limit"),
    Plan("Completions", "Entropy", ("entropy",), note="nats per token"),
    Plan("Completions", "KL to the reference", ("kl",), note="nats per token"),
    Plan("Updates", "Ratio π/π_old", ("ratio", "ratio_max"), note="over trained tokens"),
    Plan("Updates", "Clipped tokens", ("clip_fraction",), "share", note="whose gradient is cut off"),
    Plan("Updates", "Sampler against trainer", ("mismatch/k3", "mismatch/max"), log=True, note="nats, log scale"),
    Plan("Updates", "Tokens off by over 10 %", ("mismatch/beyond_10pct",), "share", note="sampler against trainer"),
    Plan("Updates", "Age of samples", ("staleness/mean", "staleness/max"), note="updates; rollouts run ahead"),
    Plan("Experts", "Largest over mean load", ("moe/max_over_mean/*",), note="by layer; 1 is perfect balance"),
    Plan("Experts", "Share of the busiest expert", ("moe/busiest/*",), "share", note="by layer"),
    Plan("Experts", "Share of the idlest expert", ("moe/idlest/*",), "share", note="by layer"),
    Plan("Experts", "Entropy of the loads", ("moe/load_entropy/*",), note="by layer, nats"),
    Plan("Experts", "Entropy of the router", ("moe/router_entropy/*",), note="by layer, nats per token"),
    Plan("Experts", "Balance loss", ("balance_loss",), note="with α"),
    Plan("Speed", "Tokens per second", ("speed/sampled", "speed/trained")),
    Plan("Speed", "Time of a step", (*PHASES, "phase/*"), "seconds", "stack", note="on the first process"),
    Plan(
        "Speed",
        "Rollouts beside the training",
        ("beside/rollout", "time/wait"),
        "seconds",
        note="and the wait for them",
    ),
    Plan("Speed", "Tokens per drafting step", ("drafts/tokens_per_step",)),
    Plan("Speed", "Drafts accepted", ("drafts/accepted/*",), "share", note="by place in the draft"),
)
_SHARES = "moe/share/*"
_LABELS = {"reward": "total", "ratio": "mean", "ratio_max": "max"}
# In the figures in another form, or of no interest.
_NOT_SHOWN = ("step", "epoch", "completions", "tokens_trained", "groups/uniform", "time/*", "eval/*", _SHARES)


def figures(run: RunData) -> list[Figure]:
    """All figures of a run, accuracy first, grouped in the order of the plans."""
    lines = [with_speeds(line) for line in run.training]
    names = sorted({name for line in lines for name, value in line.items() if number(value) is not None})
    found = [_accuracy(name, points, len(run.evaluations)) for name, points in run.evaluations.items()]
    found += [_curves(plan, lines, names) for plan in (*PLANS, *_left_over(names))]
    found.append(_last_shares(run.training))
    present = [figure for figure in found if figure is not None]
    return sorted(present, key=lambda figure: GROUPS.index(figure.group))


def steps_per_point(run: RunData) -> int:
    """How many neighbouring steps a point of a curve is the mean of."""
    return max(map(len, bins(len(run.training))), default=1)


def _curves(plan: Plan, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure | None:
    """A plan's metrics over the steps."""
    columns = {name: column(lines, name) for pattern in plan.metrics for name in matching(pattern, names)}
    if not plan.zeros:
        columns = {name: values for name, values in columns.items() if any(values)}
    # Of a single reward of weight 1 the total is the component.
    columns = {n: v for n, v in columns.items() if not (n.startswith("reward/") and v == columns.get("reward"))}
    if not columns:
        return None
    layers = plan.group == "Experts" and len(columns) > _MANY
    places = bins(len(lines), _COLUMNS if layers else POINTS)
    series = [Series(_label(name), thinned(v, places, peak=name.endswith("max"))) for name, v in columns.items()]
    note = plan.note
    if len(series) == 1 and plan.metrics[0].endswith("*"):  # it has no legend to tell which one it is
        note = "; ".join(filter(None, [series[0].name, note]))
    steps = [int(lines[place[-1]]["step"]) for place in places]
    kind: Kind = "heat" if layers else plan.kind
    return Figure(plan.group, plan.title, kind, plan.unit, steps, series, note=note, log=plan.log)


def _left_over(names: Sequence[str]) -> list[Plan]:
    """A plan for every metric that none of ours shows, those of one prefix together."""
    shown = [*_NOT_SHOWN, *(metric for plan in PLANS for metric in plan.metrics)]
    rest = [name for name in names if not any(matching(pattern, [name]) for pattern in shown)]
    together: dict[str, list[str]] = {}
    for name in rest:
        together.setdefault(name.rsplit("/", 1)[0], []).append(name)
    return [
        Plan("Other", prefix if len(of_one) > 1 else of_one[0], tuple(of_one), zeros=False)
        for prefix, of_one in together.items()
    ]


def _accuracy(name: str, points: Sequence[Evaluation], sets: int) -> Figure | None:
    """avg@k, pass@k and maj@k with their standard errors, where a set was evaluated more than once."""
    if len(points) < 2:
        return None
    last = points[-1].metrics
    k = int(last.get("samples") or 1)
    metrics = {"avg": f"avg@{k}", f"pass@{k}": f"pass@{k}", f"maj@{k}": f"maj@{k}"}
    series = []
    for metric, label in metrics.items():
        values = [point.metrics.get(metric) for point in points]
        if any(value is not None for value in values):
            series.append(Series(label, values, [point.metrics.get(f"{metric}_se") for point in points]))
    problems = f"{last['problems']:.0f} problems; " if last.get("problems") else ""
    title, note = f"Accuracy, {name}" if sets > 1 else "Accuracy", f"{problems}bars are standard errors"
    return Figure("Learning", title, "lines", "share", [point.step for point in points], series, note=note)


def _last_shares(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The share of every expert in the last step that lists them, in fair shares (1 is perfect balance)."""
    prefix = _SHARES[:-1]
    for line in reversed(lines):
        shares = {name: line[name] for name in matching(_SHARES, line) if isinstance(line[name], list) and line[name]}
        if shares:
            experts = max(len(row) for row in shares.values())
            rows = [
                Series(f"layer {name.removeprefix(prefix)}", [_times(value, len(row)) for value in row])
                for name, row in shares.items()
            ]
            note = f"at step {line['step']}; a column is an expert, 1 a fair share"
            return Figure(
                "Experts", "Load of every expert", "heat", "number", list(range(experts)), rows, "expert", note
            )
    return None


def _times(value: Any, experts: int) -> float | None:
    share = number(value)
    return None if share is None else float(f"{share * experts:.4g}")


def _label(name: str) -> str:
    """A metric's name in a legend: the part after its prefix."""
    if name in _LABELS:
        return _LABELS[name]
    return f"{'layer ' if name.startswith('moe/') else ''}{name.rsplit('/', 1)[-1]}"
