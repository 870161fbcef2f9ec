"""The one command.

    accelerate launch -m rl recipes/NAME.yaml [dotted.key=value ...]    run a recipe
    python -m rl check recipes/NAME.yaml [dotted.key=value ...]         validate and estimate; start nothing
    python -m rl samples RUN_DIR [--verdict unparsed] [--step 10:20] [--set NAME] [--limit 20] [--full]
                                                                        list completions of a run
    python -m rl rollout-worker --model PATH --secret-file FILE ...    serve a sampler to trainers (docs/rollouts.md)
    python -m rl report RUN_DIR [--out FILE] [--samples 400]    write a run, or a pipeline of runs, as one HTML file

Exit status: 0 done; 2 the recipe or its input is wrong (one message, no traceback); 130 interrupted; anything else a
failure. What a recipe may say: docs/recipes.md; `samples`, `report` and `rollout-worker` take --help.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = arguments[1:] if arguments[:1] == ["check"] else arguments
    if not arguments or words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0 if arguments else 2
    shadow = shadowed_package()
    if shadow:
        return refuse(shadow)
    if arguments[0] == "samples":
        from rl.samples import main as list_samples

        return list_samples(arguments[1:])
    if arguments[0] == "report":
        from rl.report.command import main as write_report

        return write_report(arguments[1:])
    if arguments[0] == "rollout-worker":
        from rl.rollout.workers.command import main as serve_rollouts

        return serve_rollouts(arguments[1:])
    # After the check above: from here on `data` and `rewards` are ours.
    from data.errors import DataError
    from rewards.errors import RewardError
    from rl.recipe_io import RecipeError

    checking = arguments[0] == "check"
    if checking:
        arguments = arguments[1:]
        if not arguments:
            return refuse("check needs a recipe: python -m rl check recipes/NAME.yaml")
    try:
        from rl.check import check, preflight
        from rl.recipe_io import load_recipe

        recipe = load_recipe(arguments[0], arguments[1:])
        if checking:
            print(check(recipe))
            return 0
        preflight(recipe)
        from rl.policy.backend import NonFinite
        from rl.policy.processes import leave
        from rl.runner import run

        try:
            run(recipe)
            leave()
        except NonFinite as error:
            print(f"stopped: {error}; the last checkpoint is as it was", file=sys.stderr)
            return 1
    except (RecipeError, DataError, RewardError) as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def shadowed_package() -> str | None:
    """A user's own data.py or model.py that Python would import instead of ours, as a message."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("data", "model", "rewards"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"package {name!r} is missing beside {ours / 'rl'}: install r1forge again"
        found = Path(spec.origin).resolve()
        if found != ours / name / "__init__.py":
            return (
                f"{found} hides r1forge's own package {name!r}: rename it, or run from another folder "
                "(a folder with such a file must not be the working directory or on PYTHONPATH)"
            )
    return None


if __name__ == "__main__":
    sys.exit(main())
