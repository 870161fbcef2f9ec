"""Whether a student and its teacher mean the same token by the same id."""

from __future__ import annotations

from typing import Any

from rl.policy.logprobs import Head
from rl.recipe_io import RecipeError

SHOWN = 3  # differing tokens that an error names


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """The number of ids of two tokenizers that map the same strings to the same ids.

    Chat templates may differ, and so may the models' embeddings, which are often padded to a round number of rows.
    Raises RecipeError with the first differing ids.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        by_id, by_their_id = ({i: token for token, i in vocabulary.items()} for vocabulary in (mine, theirs))
        ids = sorted(by_id.keys() | by_their_id.keys())
        differing = [i for i in ids if by_id.get(i) != by_their_id.get(i)]
        shown = ", ".join(f"{i}: {_name(by_id, i)} and {_name(by_their_id, i)}" for i in differing[:SHOWN])
        raise RecipeError(
            f"teacher: its tokenizer differs from the student's in {len(differing)} of {len(ids)} ids (the student has "
            f"{len(mine)} tokens, the teacher {len(theirs)}). The first, student and teacher: {shown}. Take a teacher "
            "with the student's vocabulary, or train the student with the teacher's tokenizer (model.tokenizer)"
        )
    return 1 + max(mine.values())


def check_rows(head: Head, count: int, field: str) -> None:
    """Raises RecipeError if a tokenizer has more ids than the model, which the recipe names `field`, has rows."""
    if len(head.weight) < count:
        raise RecipeError(
            f"{field}: the model knows {len(head.weight)} ids, its tokenizer {count}; give the tokenizer that belongs "
            f"to it ({field}.tokenizer)"
        )


def restricted(head: Head, count: int) -> Head:
    """The head for the first `count` ids only, so that two models of one vocabulary can be compared.

    What a model gives to rows beyond its tokenizer's ids, which no text has, is left out on both sides: the
    distributions compared are the models' own, renormalised over the tokenizer's ids.
    """
    if len(head.weight) == count:
        return head
    return head._replace(weight=head.weight[:count], bias=None if head.bias is None else head.bias[:count])


def _name(by_id: dict[int, str], i: int) -> str:
    return repr(by_id[i]) if i in by_id else "nothing"
