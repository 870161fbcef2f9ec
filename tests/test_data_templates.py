"""Templates, rendered and tokenised with a real (tiny) tokenizer."""

from typing import Any

import pytest
from pydantic import ValidationError

from data import (
    TEMPLATES,
    DataError,
    TemplateSpec,
    encode_prompt,
    render_completion,
    render_prompt,
    resolve_template,
    to_messages,
)

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = None, *, before: str = "<s>", after: str = "</s>") -> Any:
    """A byte-level tokenizer that wraps every text in `before` and `after`, as some tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    specials = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    single = f"{before} $A {after}".strip()
    inner.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def test_every_template_renders_a_worked_solution() -> None:
    expected = {
        "plain": "6*7=42\n\\boxed{42}",
        "r1-zero": " <think> 6*7=42 </think> <answer> 42 </answer>",
        "r1-chat": "6*7=42\n</think>\n\n\\boxed{42}",
        "r1-trace": "6*7=42\n</think>\n\nIt is \\boxed{42}.",
        "boxed": "6*7=42\n\\boxed{42}",
        "code": "6*7=42\n```python\n42\n```",
        "code-tests": "6*7=42\n```python\n42\n```",
        "short-think": "6*7=42</think><answer>42</answer>",
    }
    written = {name: render_completion("6*7=42", "42", name, "It is \\boxed{42}.") for name in TEMPLATES}
    assert written == expected


def test_latex_braces_and_placeholders_inside_values_survive() -> None:
    reasoning, answer = "so {answer} = \\frac{1}{2}\\1", "\\frac{1}{2}"
    assert render_completion(reasoning, answer, "plain") == f"{reasoning}\n\\boxed{{{answer}}}"
    messages = to_messages("Let {problem} be \\frac{a}{b}.", "boxed")
    assert messages[0]["content"].startswith("Let {problem} be \\frac{a}{b}.\nPlease reason")


def test_messages_have_the_system_turn_first() -> None:
    template = TemplateSpec(system="Be exact.", user="Q: {problem}")
    assert to_messages("1+1?", template) == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Q: 1+1?"},
    ]
    assert render_prompt(to_messages("1+1?", template), make_tokenizer(), template) == "Be exact.\n\nQ: 1+1?"


def test_r1_zero_is_raw_text_even_with_a_chat_template() -> None:
    text = render_prompt(to_messages("1+1?", "r1-zero"), make_tokenizer(CHAT), "r1-zero")
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant")
    assert text.endswith("<answer> answer here </answer>. User: 1+1?. Assistant:")
    assert "<|" not in text and "<s>" not in text


def test_chat_template_is_used_when_there_is_one() -> None:
    messages = to_messages("1+1?", "r1-chat")
    assert render_prompt(messages, make_tokenizer(CHAT), "r1-chat") == (
        "<s><|user|>1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|assistant|><think>\n"
    )
    assert render_prompt(messages, make_tokenizer(), "r1-chat") == messages[0]["content"] + "<think>\n"


@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
def test_prefill_is_not_doubled_when_the_chat_template_opens_it(opening: str) -> None:
    chat = CHAT.replace("<|assistant|>", "<|assistant|>" + opening)
    text = render_prompt(to_messages("1+1?", "r1-chat"), make_tokenizer(chat), "r1-chat")
    assert text.count("<think>") == 1 and text.endswith(opening)


def test_chat_prompt_has_one_bos_and_no_eos() -> None:
    tokenizer = make_tokenizer(CHAT)
    ids = encode_prompt(to_messages("1+1?", "boxed"), tokenizer, "boxed")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    text = render_prompt(to_messages("1+1?", "boxed"), tokenizer, "boxed")
    assert tokenizer.decode(ids) == text
    doubled = tokenizer(text)["input_ids"]  # what would happen without care
    assert doubled.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize(("before", "after", "bos"), [("<s>", "</s>", 1), ("<s>", "", 1), ("", "</s>", 0), ("", "", 0)])
def test_raw_prompt_keeps_the_first_special_tokens_and_drops_the_last(before: str, after: str, bos: int) -> None:
    tokenizer = make_tokenizer(before=before, after=after)
    ids = encode_prompt(to_messages("1+1=?", "short-think"), tokenizer, "short-think")
    text = tokenizer("1+1=?<think>", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.bos_token_id] * bos + text


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no 'r1-zer'; there are: plain, r1-zero.*did you mean 'r1-zero'\?"):
        resolve_template("r1-zer")
    with pytest.raises(DataError, match="use one of these"):
        resolve_template("qqqq")


def test_chat_without_a_chat_template_is_refused() -> None:
    template = TemplateSpec(chat=True)
    with pytest.raises(DataError, match=r"template\.chat: true, but this tokenizer has no chat template"):
        render_prompt(to_messages("1+1?", template), make_tokenizer(), template)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"user": "solve it"}, "user: must contain {problem}"),
        ({"completion": "{reasoning}"}, "completion: must contain {answer}"),
        ({"prefill": "<think>"}, "completion must close it with </think>"),
        ({"prefil": "<think>"}, "Extra inputs are not permitted"),
    ],
)
def test_template_specs_that_cannot_work(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TemplateSpec.model_validate(keys)
