"""Trained prompt = served prompt, and the answer is its continuation, byte for byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.prompt import chat_template, render
from alpaca.records import Record
from alpaca.tokens import Codec

# U+2581 is SentencePiece's own mark for a space: its tokenizers can't tell the two apart.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
text = st.text(characters, max_size=80)
answer = text.filter(str.strip) | st.sampled_from(
    ['"quoted"', "- list", "**bold**", "  indented", "\n\nnew", " </s> ", "<|end|>", "สวัสดี", "🙂"]
)
TOKENIZERS = ["bpe", "sentencepiece"]


@pytest.fixture(scope="session", params=TOKENIZERS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return Codec(request.getfixturevalue(request.param))


def example_of(codec: Codec, record: Record, limit: int = 100_000) -> tuple[list[int], list[int]]:
    example = codec.examples([record], limit)[0]
    return example.ids[: example.prompt_length], example.ids[example.prompt_length :]


@given(ask=text.filter(str.strip), context=text, output=answer)
@settings(max_examples=300)
def test_prompt_ids_are_the_served_ones_and_the_text_survives(
    codec: Codec, ask: str, context: str, output: str
) -> None:
    record = Record(instruction=ask, input=context, output=output)
    prompt, target = example_of(codec, record)
    assert prompt == codec.prompt(ask, context)
    assert codec.decode(prompt + target) == render(ask, context) + output


@given(ask=text.filter(str.strip), output=answer)
def test_exactly_one_bos_where_used_and_one_eos_at_the_end(
    codec: Codec, ask: str, output: str
) -> None:
    prompt, target = example_of(codec, Record(instruction=ask, output=output))
    ids = prompt + target
    assert ids.count(codec.eos) == 1
    assert ids[-1] == codec.eos
    if codec.bos is not None:
        assert ids.count(codec.bos) == 1
        assert ids[0] == codec.bos


def test_the_two_tokenizers_differ_in_what_matters(
    bpe: PreTrainedTokenizerBase, sentencepiece: PreTrainedTokenizerBase
) -> None:
    assert Codec(bpe).bos is None
    assert Codec(sentencepiece).bos == sentencepiece.bos_token_id
    apart = sentencepiece("word", add_special_tokens=False).input_ids
    assert Codec(sentencepiece).answers(["word"])[0] != apart  # no leading-space mark


def test_joint_tokenization_merges_across_the_border_and_ours_does_not(
    bpe: PreTrainedTokenizerBase,
) -> None:
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    definition = json.loads(bpe.backend_tokenizer.to_str())
    definition["model"]["vocab"][':"'] = len(definition["model"]["vocab"])
    definition["model"]["merges"].append([":", '"'])
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|end|>"
    )
    codec = Codec(merging)
    record = Record(instruction="Quote.", output='"x"')
    ours = codec.examples([record], 512)[0]
    joint = codec.examples([record], 512, joint=True)[0]
    assert ours.ids[: ours.prompt_length] == codec.prompt("Quote.")
    assert joint.ids[: joint.prompt_length] != codec.prompt("Quote.")
    assert codec.decode(joint.ids) == codec.decode(ours.ids)
    assert len(joint.ids) == len(ours.ids) - 1


@given(limit=st.integers(1, 120))
def test_truncation_cuts_at_the_limit_and_is_reported(codec: Codec, limit: int) -> None:
    record = Record(instruction="Count to three.", output="One, two, three.")
    whole = codec.examples([record], 10_000)[0]
    cut = codec.examples([record], limit)[0]
    assert cut.ids == whole.ids[:limit]
    assert cut.truncated == (len(whole.ids) > limit)
    assert cut.targets == max(0, min(limit, len(whole.ids)) - whole.prompt_length)


def test_a_chat_of_one_message_has_the_ids_of_the_prompt_and_controls_stay_text(
    codec: Codec,
) -> None:
    tokenizer = codec.tokenizer
    for text in ("Name three colors.", "", " x\n", f"a {tokenizer.eos_token}b", "ไทย 🙂 1 1"):
        user = {"role": "user", "content": text}
        assert codec.chat([user]) == codec.prompt(text)
        given = {"role": "input", "content": f"{tokenizer.eos_token} 1"}
        assert codec.chat([given, user]) == codec.prompt(text, given["content"])


def test_a_longer_chat_begins_as_a_prompt_and_goes_on_as_transformers(codec: Codec) -> None:
    """transformers encodes what follows a BOS without the space that `prompt` has there."""
    tokenizer = codec.tokenizer
    turns = [("user", "a b"), ("assistant", " c d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(codec.bos is not None), tokenize=False
    )
    ids, start = codec.chat(messages), codec.prompt("a b")
    assert ids[: len(start)] == start
    theirs = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[len(start) :] == theirs[len(theirs) - len(ids) + len(start) :]
    messages[1]["content"] += str(tokenizer.eos_token)  # text: one control token, that of the turn
    assert codec.chat(messages).count(codec.eos) == 1


def test_a_tokenizer_without_eos_is_refused(bpe: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    with pytest.raises(UserError, match="no EOS"):
        Codec(endless)
