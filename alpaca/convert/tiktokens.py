"""Convert Llama 3's tokenizer file, a list of byte strings by rank, to a fast tokenizer.

The file does not contain the control tokens. Their names and order are in the code of Meta's
tokenizer (llama-models, `llama3/tokenizer.py`), so they are listed here.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken

from alpaca.convert.bytelevel import byte_level, spell
from alpaca.convert.sentencepieces import pairs
from alpaca.description import Vocabulary
from alpaca.errors import UserError

RESERVED = 256
NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)


def special_tokens() -> list[str]:
    """The 256 control tokens in order of id."""
    rest = [f"reserved_special_token_{2 + number}" for number in range(RESERVED - len(NAMED))]
    return [f"<|{name}|>" for name in [*NAMED, *rest]]


def read_tiktoken(path: Path, *, instruct: bool) -> Vocabulary:
    """The vocabulary of Llama 3's `tokenizer.model`.

    Base models end a text with <|end_of_text|>; chat models end a turn with <|eot_id|>.

    Raises:
        UserError: the file is damaged.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        words = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError:
        raise UserError(f"{path} is damaged.", "Fetch the file again.") from None
    ranked = sorted(words, key=lambda word: words[word])
    if [words[word] for word in ranked] != list(range(len(lines))) or len(words) < 256:
        raise UserError(f"{path} is damaged: its ranks have gaps.", "Fetch the file again.")
    spelled = [spell(word) for word in ranked]
    vocab = {word: rank for rank, word in enumerate(spelled)}
    backend = byte_level(vocab, pairs(spelled), "llama3", whole_words=True)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special_tokens()]
    )
    end, turn = "<|end_of_text|>", "<|eot_id|>"
    return Vocabulary(
        backend,
        bos="<|begin_of_text|>",
        eos=turn if instruct else end,
        stops=(turn, "<|eom_id|>", end) if instruct else (end,),
    )
