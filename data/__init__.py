"""Problems for reinforcement learning: load them, split them, turn them into prompts, or generate them."""

from data.errors import DataError
from data.problems import describe_problems, load_problems
from data.spec import GeneratorSpec, HeldOutSpec, ProblemSpec
from data.split import held_out, normalise_statement
from data.synthetic import ALPHABET, generate
from data.templates import (
    TEMPLATES,
    TemplateSpec,
    encode_prompt,
    render_completion,
    render_prompt,
    resolve_template,
    to_messages,
)

__all__ = [
    "ALPHABET",
    "TEMPLATES",
    "DataError",
    "GeneratorSpec",
    "HeldOutSpec",
    "ProblemSpec",
    "TemplateSpec",
    "describe_problems",
    "encode_prompt",
    "generate",
    "held_out",
    "load_problems",
    "normalise_statement",
    "render_completion",
    "render_prompt",
    "resolve_template",
    "to_messages",
]
