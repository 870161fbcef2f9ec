"""recipes/r1-pipeline.yaml as a whole: every stage of it for real, with models, files and lengths of a tiny size."""

import json

import pytest

from data import load_problems
from recipes import REPO, SCRATCH
from rl.recipe_io import load_recipe
from rl.runner import run


@pytest.mark.slow
def test_the_whole_of_r1_at_a_tiny_size(tmp_path):
    problems = load_problems({"generator": {"count": 60, "levels": [1, 2, 3], "seed": 5}})
    raw, traces = tmp_path / "raw.jsonl", tmp_path / "traces.jsonl"
    text = [row["prompt"][-1]["content"] for row in problems]
    raw.write_text(
        "".join(json.dumps({"problem": t, "answer": r["answer"]}) + "\n" for t, r in zip(text, problems, strict=True))
    )
    traces.write_text(
        "".join(
            json.dumps(
                {
                    "problem": t,
                    "answer": r["answer"],
                    "generations": [f"<think>\n{r['reasoning']}\n</think>\n\n\\boxed{{{r['answer']}}}"],
                    "finish_reasons": ["stop"],
                    "is_reasoning_complete": [True],
                }
            )
            + "\n"
            for t, r in zip(text, problems, strict=True)
        )
    )
    scratch = {"scratch": {**SCRATCH, "max_positions": 1024}, "dtype": "float32"}
    judge = {"url": "http://127.0.0.1:9", "model": "nobody", "retries": 0, "timeout_s": 1.0}
    held_out = {"path": str(raw), "limit": 2}
    evaluate = {"sets": {"aime24": held_out, "math500": held_out}, "samples": 1, "max_tokens": 4}
    short = {"max_tokens": 8, "max_prompt_tokens": 512}
    overrides = {
        "output_dir": tmp_path / "r1",
        "values.policy": scratch,
        "values.judge": judge,
        "values.evaluate": evaluate,
        "stages.problems.sources": [{"name": "made", "path": str(raw)}],
        "stages.problems.decontaminate.sets": [],
        "stages.cold-traces.traces": {"path": str(traces), "hub": None, "adapter": "openr1"},
        "stages.cold-traces.tokenizer": None,
        **{f"stages.{s}.select": {"min_reward": None, "finished": False, "language": None}
           for s in ("rejection", "pool")},
    }  # fmt: skip
    for name in ("reasoner", "student-1_5b", "student-7b", "student-8b"):
        overrides[f"stages.{name}.data.template"] = "r1-chat"  # traces of random weights never end their thinking
    for name in ("cold-start", "reasoner", "student-1_5b", "student-7b", "student-8b"):
        overrides[f"stages.{name}.sft"] = {"steps": 1, "batch_size": 4, "tokens_per_microbatch": 2048}
    for name in ("student-1_5b", "student-7b", "student-8b"):
        overrides[f"stages.{name}.model"] = {**scratch, "tokenizer": None, "config": {}}
    for name in ("rl-1", "rl-2", "rl-2-preference"):
        overrides[f"stages.{name}.rollout"] = short
        overrides[f"stages.{name}.grpo"] = {
            "steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "minibatches_per_step": 2,
            "tokens_per_microbatch": 2048,
        }  # fmt: skip
    for name in ("rejection", "pool"):
        overrides[f"stages.{name}.data.limit"] = 3
        overrides[f"stages.{name}.teacher"] = {"samples": 2, **short}
    recipe = load_recipe(
        str(REPO / "recipes" / "r1-pipeline.yaml"),
        [
            f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
            for key, value in overrides.items()
        ],
    )
    stages = run(recipe)["stages"]
    assert list(stages) == list(recipe.stages) and len(stages) == 12
    assert stages["cold-traces"]["kept"] > 20 and stages["pool"]["kept"] > 0
    assert stages["rl-2-preference"]["updates"] == 2 and "eval/math500/avg" in stages["student-8b"]["evaluation"]
    assert (tmp_path / "r1" / "report.html").is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r1").glob("*/summary.json")}
    assert run(recipe)["stages"] == stages
    assert before == {p: p.stat().st_mtime_ns for p in before}
