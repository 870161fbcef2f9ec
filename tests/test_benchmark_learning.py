"""The tables of benchmarks that train, from runs whose figures are known."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def write_run(folder: Path, rewards: list[float], accuracy: float) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": i, "reward": r, "time/step": 2.0, "mismatch/k3": r / 10} for i, r in enumerate(rewards, start=1)]
    rows.append({"step": len(rewards), "evaluation": True, "eval/held_out/avg": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"eval/held_out/avg": accuracy, "eval/held_out/avg_se": 0.01}
    (folder / "summary.json").write_text(json.dumps({"evaluation": evaluation}))


def test_variants_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for seed, (first, second) in enumerate([(0.5, 0.6), (0.7, 0.7), (0.4, 0.6)]):
        write_run(tmp_path / f"seed-{seed}" / "start", [0.0] * 4, 0.1)
        write_run(tmp_path / f"seed-{seed}" / "a", [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 1.0, 1.0], first)
        write_run(tmp_path / f"seed-{seed}" / "b", [0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, float(seed == 1)], second)
    comparison = importlib.import_module("learning").Comparison(("a", "b"), ("mismatch/k3",))
    found = comparison.summarise([0, 1, 2], tmp_path)
    assert found["a"]["quarters"][0] == pytest.approx([0.1, 0.5, 0.8, 1.0])
    assert [q[3] for q in found["b"]["quarters"]] == pytest.approx([0.5, 1.0, 0.5])
    assert found["b"]["above_first"]["mean"] == pytest.approx(0.1)
    assert found["b"]["above_first"]["se"] == pytest.approx(0.1 / 3**0.5)  # deviation 0.1 of three pairs
    assert found["a"]["largest"] == {"mismatch/k3": pytest.approx(0.1)}
    table = comparison.tables([0, 1, 2], found)
    assert "| 1    | 10.0% ± 1.0% | 70.0% ± 1.0% | 70.0% ± 1.0% |" in table
    assert "b above a: +10.0% ± 5.8% (s.e. of 3 pairs)" in table


def test_losses_of_a_pair_are_compared_over_their_end() -> None:
    def loss(end: float) -> list[float]:
        return [9.0] * 900 + [end] * 100

    losses = {
        ("bf16", 0): loss(2.0), ("fp8", 0): [1.0] * 900 + [2.01] * 100, ("float32", 0): loss(2.0),
        ("bf16", 1): loss(4.0), ("fp8", 1): [1.0] * 900 + [3.98] * 100, ("float32", 1): loss(4.4),
    }  # fmt: skip
    benchmark = importlib.import_module("fp8_training")
    found = benchmark.summarise(losses, [0, 1])
    assert found["averaged"] == 100
    assert found["gap"] == {"fp8": pytest.approx([0.005, -0.005]), "float32": pytest.approx([0.0, 0.1])}
    assert found["gap_se"] == {"fp8": pytest.approx(0.005), "float32": pytest.approx(0.05)}
    assert found["seed_spread"] == pytest.approx(2**0.5 / 3)  # of 2 and 4
    assert "| 1    | 4.00000 | 3.98000 | 4.40000 |        -0.500% |           +10.000% |" in benchmark.table(
        [0, 1], found
    )
    assert "float32: mean gap +5.000% ± 5.000% (s.e. of 2 pairs)" in benchmark.table([0, 1], found)
