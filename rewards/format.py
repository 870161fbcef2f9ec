"""Format reward (DeepSeek-R1, arXiv 2501.12948, section 2.2.1): reasoning in tags, then an answer.

    r = 1.0 if prefill + completion has the form below, else 0.0

    style "think-answer"   <think>…</think> <answer>…</answer>
    style "think"          <think>…</think> answer text

Exactly one think block (and one answer block), none of them blank, nothing before the first tag. The text the
chat template prefills belongs to the form: without it a template that ends in `<think>` would always score 0.
None is never returned: every completion has a form.
"""

import re
from collections.abc import Sequence
from typing import Literal

from .messages import Completion, completion_text

Style = Literal["think-answer", "think"]

# A block holds anything but the tags that the style counts; possessive, so that matching stays linear.
_FORMS = {
    "think-answer": re.compile(
        r"<think>(?P<thought>(?:(?!</?(?:think|answer)>).)*+)</think>\s*+"
        r"<answer>(?P<answer>(?:(?!</?(?:think|answer)>).)*+)</answer>\s*",
        re.DOTALL,
    ),
    "think": re.compile(r"<think>(?P<thought>(?:(?!</?think>).)*+)</think>(?P<answer>(?:(?!</?think>).)*+)", re.DOTALL),
}


def format_reward(
    completions: Sequence[Completion], *, style: Style = "think-answer", prefill: str = ""
) -> list[float]:
    """1.0 or 0.0 per completion. Raises ValueError for an unknown style."""
    if style not in _FORMS:
        raise ValueError(f"style must be one of {sorted(_FORMS)}, not {style!r}")
    return [float(has_form(prefill + completion_text(completion), style)) for completion in completions]


def has_form(text: str, style: Style) -> bool:
    """Does the whole of `text` have the form?"""
    form = _FORMS[style].fullmatch(text)
    return form is not None and bool(form["thought"].strip()) and bool(form["answer"].strip())
