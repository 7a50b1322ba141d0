"""Converted tokenizers encode like the originals: real files, read by their own libraries."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import sentencepiece
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import LLAMA_1, LLAMA_3, convert
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from wheels import SENTENCEPIECE, TIKTOKEN

from alpaca.convert.bytelevel import spell
from alpaca.convert.sentencepieces import read_sentencepiece
from alpaca.convert.tiktokens import special_tokens
from alpaca.prompt import render

ROOT = Path(__file__).resolve().parent.parent
CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces before, and after  ",
    "\n\nnew lines\r\n\ttabs\t",
    "tell me something about รามาเกียรติ์",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "family 👩‍👩‍👧‍👦, flag 🇹🇭, tone 👍🏽",
    "def f(x):\n    return {'a': x[1:], \"b\": 0x1F}  # comment\n",
    "control \x00\x01\x07\x1b[0m\x7f\x85 end",
    "1234567890 3.14159 1,000,000",
    "don't I'LL we'Ve ſ's K's",
    "naïve façade — “quotes” … №",
    "ﬁ ligature, ½, e\u0301 combining",
    "\u2028line\u2029paragraph\u3000ideographic\u00a0no-break",
    "中文、日本語、한국어",
    "\U0001f9ff\U000e0041\U0010ffff",
    "a" * 300,
    " " * 100,
    render("Add.", "1 + 1"),
]
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aeiou  '\n\t_-0123456789ไทย้์👍🏽\u200d\ufe0f\u2581\u00a0\x00"),
    ),
    max_size=40,
)


class Pair:
    """A converted tokenizer and the library that reads the original file."""

    def __init__(self, folder: Path, original: Any) -> None:
        self.loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.original = original

    def ids(self, text: str) -> list[int]:
        # "</s>" in a text is text, as it is to the original.
        encoded = self.loaded(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded.input_ids)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """LLaMA-style SentencePiece, through the command."""
    shape = replace(LLAMA_1, dim=8, heads=2, kv_heads=2, layers=1, vocab=32000)
    folder = converted(tmp_path_factory.mktemp("spm"), shape, SENTENCEPIECE.path())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE.path()))
    return Pair(folder, processor.encode)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Llama 3's own file, through the command."""
    shape = replace(LLAMA_3, dim=8, heads=2, kv_heads=1, layers=1, vocab=128256)
    folder = converted(tmp_path_factory.mktemp("tik"), shape, TIKTOKEN.path())
    lines = (line.split() for line in TIKTOKEN.path().read_bytes().splitlines())
    encoding = tiktoken.Encoding(
        "llama3",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks={base64.b64decode(word): int(rank) for word, rank in lines},
        special_tokens={token: 128000 + i for i, token in enumerate(special_tokens())},
    )
    return Pair(folder, lambda text: encoding.encode(text, disallowed_special=()))


def converted(root: Path, shape: reference.Shape, tokenizer: Path) -> Path:
    held = reference.weights(shape, torch.bfloat16)
    folder = reference.save(root / "in" / "tiny", shape, held)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    code, said = convert("--input_dir", folder, "--output_dir", root / "out")
    assert code == 0, said
    return root / "out" / "tiny"


@pytest.mark.parametrize("text", CORPUS)
def test_corpus_is_encoded_like_the_original(text: str, llama: Pair, llama3: Pair) -> None:
    assert llama.ids(text) == llama.original(text)
    assert llama3.ids(text) == llama3.original(text)


def test_long_real_text_is_encoded_like_the_original(llama: Pair, llama3: Pair) -> None:
    llama.loaded.model_max_length = llama3.loaded.model_max_length = 1_000_000  # no warning
    text = "\n".join(path.read_text() for path in sorted((ROOT / "alpaca").rglob("*.py")))
    assert len(text) > 50_000
    assert llama.ids(text) == llama.original(text)
    assert llama3.ids(text) == llama3.original(text)


@given(text=TEXT)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_is_encoded_like_the_original(text: str, llama: Pair, llama3: Pair) -> None:
    assert llama.ids(text) == llama.original(text)
    assert llama3.ids(text) == llama3.original(text)


@pytest.mark.slow
@given(text=TEXT)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ten_thousand_texts_are_encoded_like_the_original(
    text: str, llama: Pair, llama3: Pair
) -> None:
    assert llama.ids(text) == llama.original(text)
    assert llama3.ids(text) == llama3.original(text)


def test_special_ids_are_the_originals(llama: Pair, llama3: Pair) -> None:
    loaded = llama.loaded
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert llama3.loaded.bos_token_id == 128000
    assert llama3.loaded.eos_token_id == 128001
    assert llama3.loaded.convert_tokens_to_ids("<|eot_id|>") == 128009
    assert len(llama3.loaded) == 128256


@pytest.mark.parametrize("given_input", ["", "some {input} with {{braces}} and </s>"])
def test_chat_template_renders_the_alpaca_prompt(
    given_input: str, llama: Pair, llama3: Pair
) -> None:
    messages = [{"role": "user", "content": "Say {this}."}]
    if given_input:
        messages.insert(0, {"role": "input", "content": given_input})
    for pair in (llama, llama3):
        text = pair.loaded.apply_chat_template(messages, tokenize=False)
        assert text == pair.loaded.bos_token + render("Say {this}.", given_input)
        ids = pair.loaded.apply_chat_template(messages, tokenize=True, return_dict=False)
        head = [pair.loaded.bos_token_id]
        assert ids[:1] == head
        assert ids[1:2] != head, "two BOS"
        if "</s>" not in text:
            assert ids == head + pair.original(render("Say {this}.", given_input))


def test_decoding_gives_the_text_back(llama: Pair, llama3: Pair) -> None:
    for text in CORPUS:
        assert llama3.loaded.decode(llama3.ids(text)) == text
        assert llama.loaded.decode(llama.ids(text)) == text


def test_class_name_is_known_everywhere(llama: Pair) -> None:
    assert (
        '"tokenizer_class": "PreTrainedTokenizerFast"'
        in (Path(llama.loaded.name_or_path) / "tokenizer_config.json").read_text()
    )


def test_bytes_are_spelled_as_gpt2_spells_them() -> None:
    assert spell(b" a\n\x00\xff") == "ĠaĊĀÿ"
    assert len({spell(bytes([byte])) for byte in range(256)}) == 256


def test_every_sentencepiece_token_survives(llama: Pair) -> None:
    vocabulary = read_sentencepiece(SENTENCEPIECE.path())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE.path()))
    for index in range(processor.get_piece_size()):
        assert vocabulary.backend.id_to_token(index) == processor.id_to_piece(index)
    assert vocabulary.pieces == processor.get_piece_size()
