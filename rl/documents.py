"""What supervised training learns from, in tokens: worked solutions of problems, or whole texts."""

from __future__ import annotations

from typing import Any

from data.spec import ProblemSpec, TextSpec
from data.templates import render_completion, resolve_template
from data.texts import load_texts
from rl.policy.packing import Document
from rl.prompts import load_prompts
from rl.recipe import SFTRecipe
from rl.recipe_io import RecipeError


def training_documents(recipe: SFTRecipe, tokenizer: Any) -> tuple[list[Document], int]:
    """The recipe's documents, and how many were left out for their length."""
    if recipe.texts is not None:
        return texts(recipe.texts, tokenizer, recipe.sft.max_tokens)
    assert recipe.data is not None  # SFTRecipe: exactly one of the two
    return solved_problems(recipe.data, tokenizer, recipe.sft.max_tokens)


def solved_problems(
    spec: ProblemSpec, tokenizer: Any, max_tokens: int, limit: str = "sft.max_tokens"
) -> tuple[list[Document], int]:
    """Prompt and worked solution of each problem, EOS included, and how many were too long.

    limit: the recipe's name of max_tokens, for the error when no document is within it.

    The completion is tokenised apart from the prompt, as sampling will continue it.
    """
    template = resolve_template(spec.template)
    prompts = load_prompts(spec, tokenizer, max_tokens=max_tokens)
    documents, dropped = [], prompts.dropped
    for prompt in prompts.items:
        if not prompt.row.get("reasoning") and "{reasoning}" in template.completion:
            raise RecipeError(
                f"data: problem {prompt.row['id']} has no `reasoning` to learn from; map it with "
                "data.columns: {reasoning: COLUMN}, or use a template whose completion has no {reasoning}"
            )
        if not prompt.row.get("response") and "{response}" in template.completion:
            raise RecipeError(
                f"data: problem {prompt.row['id']} has no `response` to learn from, as the pool of a distillation has; "
                "map it with data.columns: {response: COLUMN}, or use a template whose completion has {answer}"
            )
        # A trace ends in its teacher's own answer, which need not be the right one.
        answer = prompt.row.get("solution_answer") or prompt.row["answer"]
        response = prompt.row.get("response") or ""
        text = render_completion(prompt.row.get("reasoning") or "", answer, template, response)
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(prompt.ids) + len(ids) > max_tokens:
            dropped += 1
        else:
            documents.append(Document(prompt.ids, ids))
    if not documents:
        raise RecipeError(f"{limit}: no document is within {max_tokens} tokens")
    return documents, dropped


def texts(spec: TextSpec, tokenizer: Any, max_tokens: int) -> tuple[list[Document], int]:
    """Every token of a text is learned but its first; texts longer than max_tokens are cut into pieces."""
    documents, dropped = [], 0
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in load_texts(spec):
        ids = [*start, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(ids) < spec.min_tokens:
            dropped += 1
            continue
        pieces = [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
        documents += [Document(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    if not documents:
        raise RecipeError(f"texts.min_tokens: no text has {spec.min_tokens} tokens; {dropped} were shorter")
    return documents, dropped
