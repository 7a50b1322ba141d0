"""Text from tokens: pieces join to the text, hold no half characters, and stop where they must."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.serving.stream import TextStream, token_bytes
from alpaca.tokens import Codec

texts = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60) | st.text(
    "aé字👩‍👩‍👧‍👦กำ🇹🇭\u200d\n �", max_size=40
)


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return Codec(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def table(codec: Codec) -> list[bytes]:
    return token_bytes(codec.tokenizer)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_pieces_join_to_the_text(codec: Codec, table: list[bytes], text: str) -> None:
    stream = TextStream(table)
    pieces = [stream.push(token) for token in codec.answers([text])[0]]
    assert "".join(pieces) == text
    assert stream.finish() == ""


@settings(max_examples=200, deadline=None)
@given(text=texts, data=st.data())
def test_an_answer_cut_anywhere_is_a_beginning_of_the_text(
    codec: Codec, table: list[bytes], text: str, data: st.DataObject
) -> None:
    tokens = codec.answers([text])[0]
    cut = data.draw(st.integers(0, len(tokens)))
    stream = TextStream(table)
    said = "".join(stream.push(token) for token in tokens[:cut]) + stream.finish()
    assert text.startswith(said)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab☃ ", max_size=30),
    stops=st.lists(st.text("ab☃ ", max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_across_token_borders(
    codec: Codec, table: list[bytes], text: str, stops: list[str]
) -> None:
    stream = TextStream(table, stops)
    pieces = [stream.push(token) for token in codec.answers([text])[0]]
    said = "".join(pieces) + stream.finish()
    found = [text.find(stop) for stop in stops if stop and stop in text]
    assert stream.stopped == bool(found)
    if found:
        assert said in {
            text[:at] for s in stops if s for at in range(len(text)) if text[at:].startswith(s)
        }
        assert not any(stop and stop in said for stop in stops)
    else:
        assert said == text


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 900), max_size=40))
def test_any_tokens_at_all_give_text(table: list[bytes], tokens: list[int]) -> None:
    stream = TextStream(table)
    said = "".join(stream.push(token) for token in tokens) + stream.finish()
    whole = b"".join(table[token] for token in tokens)
    said.encode()
    assert whole.decode(errors="replace").startswith(said)


def test_the_table_agrees_with_the_tokenizer_after_a_prompt(
    codec: Codec, table: list[bytes]
) -> None:
    prompt = codec.prompt("x")
    before = codec.decode(prompt)
    for token in range(len(table)):
        try:
            alone = table[token].decode()
        except UnicodeDecodeError:
            continue
        assert codec.decode([*prompt, token]) == before + alone, token


def test_an_unknown_decoder_is_refused(bpe: PreTrainedTokenizerBase) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    with pytest.raises(UserError, match="not supported"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>"))
