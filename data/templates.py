"""From a problem statement to the tokens a policy sees, and from a solution to the text it should write.

A template says what the user's turn looks like, how the assistant's turn begins (the prefill) and how a
complete worked solution is written after it (the completion; what SFT trains on).
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, model_validator

from data.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


class TemplateSpec(BaseModel):
    """How a problem becomes a prompt, and a solution a completion.

    LaTeX is full of braces, so the placeholders are replaced literally and `str.format` is never used:
    `\\boxed{{answer}}` renders as `\\boxed{42}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    user: str = "{problem}"  # the user's turn; must contain {problem}, may contain {tests} (of a code problem)
    system: str | None = None
    chat: bool | None = None  # None: the tokenizer's chat template if it has one; False: raw text
    prefill: str = ""  # the text that starts the assistant's reply
    # What follows the prefill in a worked solution. {answer} is its bare final answer, {response} the whole text
    # that a teacher wrote after the reasoning (of data that has one, see data/traces.py).
    completion: str = "{reasoning}\n\\boxed{{answer}}"

    @model_validator(mode="after")
    def _check_placeholders(self) -> "TemplateSpec":
        if "{problem}" not in self.user:
            raise ValueError("user: must contain {problem}, else every prompt is the same")
        if "{answer}" not in self.completion and "{response}" not in self.completion:
            raise ValueError("completion: must contain {answer} or {response}, else a worked solution has no answer")
        if "<think>" in self.prefill and "</think>" not in self.completion:
            raise ValueError("completion: the prefill opens <think>, so the completion must close it with </think>")
        return self


TEMPLATES: dict[str, TemplateSpec] = {
    "plain": TemplateSpec(),
    # Table 1 of the DeepSeek-R1 paper (arXiv 2501.12948), word for word, the full stop after the
    # prompt included. A base model reads it as raw text; nothing is prefilled: <think> is to be learnt.
    "r1-zero": TemplateSpec(
        user=(
            "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
            "it. The assistant first thinks about the reasoning process in the mind and then provides the "
            "user with the answer. The reasoning process and answer are enclosed within <think> </think> and "
            "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
            "<answer> answer here </answer>. User: {problem}. Assistant:"
        ),
        chat=False,
        completion=" <think> {reasoning} </think> <answer> {answer} </answer>",
    ),
    "r1-chat": TemplateSpec(
        user="{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        prefill="<think>\n",
        completion="{reasoning}\n</think>\n\n\\boxed{{answer}}",
    ),
    # The same prompt, for students of a teacher's traces: the text after the reasoning is the teacher's own.
    "r1-trace": TemplateSpec(
        user="{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        prefill="<think>\n",
        completion="{reasoning}\n</think>\n\n{response}",
    ),
    "boxed": TemplateSpec(user="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."),
    "code": TemplateSpec(
        user="{problem}\n\nWrite the program in one ```python block.",
        completion="{reasoning}\n```python\n{answer}\n```",
    ),
    # MBPP's statements do not name the function: its tests do (arXiv 2108.07732, section 3).
    "code-tests": TemplateSpec(
        user="{problem}\n\nYour code must pass these tests:\n{tests}\n\nWrite it in one ```python block.",
        completion="{reasoning}\n```python\n{answer}\n```",
    ),
    # For character-level models small enough to train on a CPU: as few characters as will do.
    "short-think": TemplateSpec(
        chat=False, prefill="<think>", completion="{reasoning}</think><answer>{answer}</answer>"
    ),
}


def resolve_template(template: str | TemplateSpec) -> TemplateSpec:
    """The template of that name, or the given one itself.

    Raises DataError (a ValueError) for an unknown name, with the nearest known one.
    """
    if isinstance(template, TemplateSpec):
        return template
    if template not in TEMPLATES:
        fix = did_you_mean(template, TEMPLATES) or "use one of these, or give a mapping with `user`."
        raise DataError("template", f"there is no {template!r}; there are: {', '.join(TEMPLATES)}", fix)
    return TEMPLATES[template]


def to_messages(problem: str, template: str | TemplateSpec, tests: str = "") -> list[dict[str, str]]:
    """The chat messages for one problem: the system message, if the template has one, and the user's turn."""
    spec = resolve_template(template)
    text = tests.join(part.replace("{problem}", problem) for part in spec.user.split("{tests}"))
    user = {"role": "user", "content": text}
    return [user] if spec.system is None else [{"role": "system", "content": spec.system}, user]


def uses_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str | TemplateSpec) -> bool:
    """Whether prompts go through the tokenizer's chat template; DataError if asked to and it has none."""
    spec = resolve_template(template)
    has_one = getattr(tokenizer, "chat_template", None) is not None
    if spec.chat and not has_one:
        raise DataError(
            "template.chat",
            "true, but this tokenizer has no chat template",
            "Use chat: false for raw text, or a tokenizer with a chat template.",
        )
    return has_one if spec.chat is None else spec.chat


def render_prompt(messages: Messages, tokenizer: "PreTrainedTokenizerBase", template: str | TemplateSpec) -> str:
    """The prompt as one string that ends with the template's prefill.

    Raw text is the messages' contents, a blank line between them.
    """
    spec = resolve_template(template)
    if not uses_chat_template(tokenizer, spec):
        return "\n\n".join(str(message["content"]) for message in messages) + spec.prefill
    chat = [dict(message) for message in messages]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    # The chat templates of reasoning models (DeepSeek-R1's own among them) already open <think>.
    opened = bool(spec.prefill.strip()) and text.rstrip().endswith(spec.prefill.strip())
    return text if opened else text + spec.prefill


def encode_prompt(messages: Messages, tokenizer: "PreTrainedTokenizerBase", template: str | TemplateSpec) -> list[int]:
    """Token ids of the prompt, ready to be continued: at most one BOS, never an EOS at the end.

    A chat template writes its special tokens itself. Raw text gets those that the tokenizer puts in
    front of a text, but not those that it puts behind one.
    """
    text = render_prompt(messages, tokenizer, template)
    bare: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if uses_chat_template(tokenizer, template):
        return bare
    full: list[int] = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[: start + len(bare)]
    return bare


def render_completion(reasoning: str, answer: str, template: str | TemplateSpec, response: str = "") -> str:
    """The worked solution as the assistant should write it after the prefill (which it excludes)."""
    values = {"{reasoning}": reasoning, "{answer}": answer, "{response}": response}
    # One pass: a literal "{answer}" inside the reasoning is text, not a placeholder.
    return re.sub("|".join(map(re.escape, values)), lambda m: values[m.group()], resolve_template(template).completion)
