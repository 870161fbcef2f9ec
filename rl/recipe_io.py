"""Reading a recipe: YAML with `extends:`, dotted overrides, and errors that say what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rl import yaml_text
from rl.recipe import EvalRecipe, GRPORecipe, SFTRecipe, StagesRecipe
from rl.recipe_data import DataRecipe
from rl.recipe_distill import DistillRecipe
from rl.recipe_gkd import GKDRecipe

PIPELINES: dict[str, type[BaseModel]] = {
    "data": DataRecipe,
    "grpo": GRPORecipe,
    "sft": SFTRecipe,
    "gkd": GKDRecipe,
    "eval": EvalRecipe,
    "distill": DistillRecipe,
    "stages": StagesRecipe,
}
Recipe = Annotated[
    DataRecipe | GRPORecipe | SFTRecipe | GKDRecipe | EvalRecipe | DistillRecipe | StagesRecipe,
    Field(discriminator="pipeline"),
]
SHIPPED = (Path(__file__).parent / "shipped_recipes", Path(__file__).parent.parent / "recipes")


class RecipeError(ValueError):
    """A recipe or its input is wrong; the message names the field, the reason and the fix."""


def load_recipe(path: str, overrides: Iterable[str] = ()) -> Any:
    """Reads, merges and validates a recipe. Raises RecipeError with every problem found."""
    raw = read_yaml(find_recipe(path))
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def find_recipe(path: str) -> Path:
    """The file as given, or the recipe of that name that ships with the package."""
    given = Path(path)
    if given.is_file():
        return given
    names = [given.name] if given.suffix in (".yaml", ".yml") else [given.name + ".yaml"]
    for folder in SHIPPED:
        for name in names:
            if str(given.parent) in (".", "recipes") and (folder / name).is_file():
                return folder / name
    known = sorted({p.name for folder in SHIPPED if folder.is_dir() for p in folder.glob("*.yaml")})
    here = [str(p) for p in given.parent.glob("*.yaml")] if given.parent.is_dir() else []
    raise RecipeError(f"no recipe file {path}{nearest(given.name, [*known, *here])}")


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping merged over the one it `extends` (a path relative to the file)."""
    path = path.resolve()
    if path in seen:
        raise RecipeError("extends: recipes extend each other in a circle: " + " -> ".join(p.name for p in seen))
    try:
        raw = yaml_text.parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name} must be a mapping of fields, such as `pipeline: grpo`")
    stages: Any = raw.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        base = stage.get("extends") if isinstance(stage, dict) else None
        if isinstance(base, str) and not base.startswith("${"):  # a stage may be a recipe of its own file
            stages[name] = _extended(path, seen, f"stages.{name}.extends", base, stage)
            if "output_dir" not in stage:  # not that recipe's: a stage has its folder in the pipeline's
                stages[name].pop("output_dir", None)
    base = raw.get("extends")
    return raw if base is None else _extended(path, seen, "extends", str(base), raw)


def _extended(path: Path, seen: tuple[Path, ...], field: str, base: str, raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, which stands in the file `path`, merged over the recipe file `base` beside it."""
    parent = path.parent / base
    if not parent.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")]
        raise RecipeError(f"{field}: no file {base} beside {path.name}{nearest(base, siblings)}")
    return merge(read_yaml(parent, (*seen, path)), {key: value for key, value in raw.items() if key != "extends"})


# Naming one of these replaces what the base recipe said by another of its kind.
REPLACES = {
    "path": ("scratch", "hub", "generator", "config", "revision"),
    "scratch": ("path", "revision"),
    "hub": ("path", "generator", "config", "revision"),
    "generator": ("path", "hub", "config", "revision"),
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged field by field, everything else is replaced."""
    merged = dict(base)
    for name in over.keys() & REPLACES.keys():
        if over[name] is not None:
            for other in REPLACES[name]:
                merged.pop(other, None)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in place; the value is read as YAML. List items by number: `rewards.0.weight=2`."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"override {override!r} must look like dotted.key=value")
    try:
        value = yaml_text.parse(text) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(f"override {key}: the value is not valid YAML: {error}") from error
    node: Any = raw
    parts = key.strip().split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        where = ".".join(parts[: i + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(f"override {where}: the list has {len(node)} items, numbered from 0")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                merged = merge(node, {part: value})
                node.clear()
                node.update(merged)
            else:
                if node.get(part) is None:
                    node.update(merge(node, {part: {}}))
                node = node[part]
        else:
            raise RecipeError(f"override {where}: {'.'.join(parts[:i])} is {node!r}, which has no fields")


def validate(raw: Mapping[str, Any]) -> Any:
    """The typed recipe; RecipeError lists each wrong field with its reason and the nearest valid name."""
    pipeline = raw.get("pipeline")
    if pipeline not in PIPELINES:
        said = "is missing" if pipeline is None else f"{pipeline!r} is unknown"
        raise RecipeError(f"pipeline: {said}{nearest(str(pipeline), PIPELINES)}; one of {', '.join(PIPELINES)}")
    try:
        return TypeAdapter(Recipe).validate_python(dict(raw))
    except ValidationError as error:
        lines = [_explain(detail, PIPELINES[str(pipeline)]) for detail in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from error


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML."""
    return yaml_text.dump(recipe.model_dump(mode="json"))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain(detail: ErrorDetails, root: type[BaseModel]) -> str:
    location = list(detail["loc"])
    if location and location[0] in PIPELINES:  # the discriminator's tag, which is not a field
        location = location[1:]
    field = ".".join(str(part) for part in _without_tags(root, location))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        siblings = _fields_at(root, location[:-1])
        hint = nearest(str(location[-1]), siblings)
        listing = "" if hint else f"; fields here: {', '.join(siblings)}"
        return f"{field}: unknown field{hint}{listing}"
    if detail["type"] == "missing":
        return f"{field}: required, but not given"
    given = detail.get("input")
    secret = bool(location) and str(location[-1]).startswith("api_key")  # the key itself, by mistake
    plain = not isinstance(given, dict | list | BaseModel) and given is not None and not secret
    shown = f" (given: {given!r})" if plain else ""
    if detail["type"] == "literal_error":
        expected = str(detail.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ")
        return f"{field}: {message}{shown}{nearest(str(given), expected.split(', '))}"
    return f"{field or 'recipe'}: {message}{shown}"


def _fields_at(root: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the model that a location leads to."""
    current = _walk(root, location)[-1][0]
    return list(current.model_fields) if current else []


def _without_tags(root: type[BaseModel], location: list[Any]) -> list[Any]:
    """The location without the names of the kinds of a union (`engine: api`), which no recipe spells as a field."""
    return [part for part, (_, is_tag) in zip(location, _walk(root, location)[1:], strict=True) if not is_tag]


def _walk(root: type[BaseModel], location: list[Any]) -> list[tuple[type[BaseModel] | None, bool]]:
    """(model, whether the part that led there is a union's tag) after each part, the root first."""
    steps: list[tuple[type[BaseModel] | None, bool]] = [(root, False)]
    annotation: Any = None
    for part in location:
        current, tagged = steps[-1][0], None
        if current is not None and part in current.model_fields:  # list positions and dictionary keys stay put
            annotation = current.model_fields[part].annotation
            current = _model_in(annotation)
        elif annotation is not None:
            tagged = next((m for m in _models_in(annotation) if part in _tags(m)), None)
            current = tagged or current
        steps.append((current, tagged is not None))
    return steps


def _tags(model: type[BaseModel]) -> list[Any]:
    """The values that a union tells this model by: those of required fields that allow nothing else."""
    literals = [typing.get_args(field.annotation) for field in model.model_fields.values() if field.is_required()]
    return [value for values in literals for value in values if isinstance(value, str)]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The (first) pydantic model inside Optional[...], list[...] or dict[str, ...]."""
    return next(iter(_models_in(annotation)), None)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
