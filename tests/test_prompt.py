"""The templates are an interface: byte for byte, in training, serving and the chat template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alpaca import prompt

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_template_without_input_is_the_published_one() -> None:
    assert prompt.render("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
    )


def test_template_with_input_is_the_published_one() -> None:
    assert prompt.render("Translate.", "chat") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:"
    )


def test_template_hash_is_that_of_the_published_texts() -> None:
    assert prompt.template_hash() == (
        "832d55b5e3033cb5130c245e2702c185118e49b2c4ce033ae4bafd753f2d779a"
    )


@given(text, text)
def test_render_equals_formatting_the_template_whatever_the_text(ask: str, given: str) -> None:
    template = prompt.WITH_INPUT if given else prompt.NO_INPUT
    expected = template.format(instruction=ask, input=given)
    assert prompt.render(ask, given) == expected


@pytest.mark.parametrize("adds_bos", [False, True])
@given(ask=text, given=text)
def test_chat_template_renders_the_same_bytes(
    bpe: PreTrainedTokenizerBase, adds_bos: bool, ask: str, given: str
) -> None:
    messages = [{"role": "user", "content": ask}]
    if given:
        messages.insert(0, {"role": "input", "content": given})
    rendered = bpe.apply_chat_template(
        messages, chat_template=prompt.chat_template(adds_bos), tokenize=False
    )
    assert rendered == (bpe.bos_token if adds_bos else "") + prompt.render(ask, given)


@given(ask=text, given=text)
def test_chat_template_takes_text_parts(bpe: PreTrainedTokenizerBase, ask: str, given: str) -> None:
    """As clients of OpenAI's API send them."""
    parts = [{"type": "text", "text": ask}, {"type": "text", "text": given}]
    rendered = bpe.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=prompt.chat_template(False),
        tokenize=False,
    )
    assert rendered == prompt.render(ask + given)


def test_chat_template_refuses_what_is_no_text(bpe: PreTrainedTokenizerBase) -> None:
    image = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    with pytest.raises(TemplateError, match="Only text is answered"):
        bpe.apply_chat_template(
            [{"role": "user", "content": image}],
            chat_template=prompt.chat_template(False),
            tokenize=False,
        )


def test_chat_template_closes_earlier_answers_and_keeps_the_system_message(
    bpe: PreTrainedTokenizerBase,
) -> None:
    messages = [
        {"role": "system", "content": "Answer in Thai."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " สวัสดี"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = bpe.apply_chat_template(
        messages, chat_template=prompt.chat_template(False), tokenize=False
    )
    first = prompt.render("Answer in Thai.\n\nHello")
    assert rendered == first + " สวัสดี" + str(bpe.eos_token) + prompt.render("Bye")
