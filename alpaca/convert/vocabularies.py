"""Read a `tokenizer.model`, which may be SentencePiece's or tiktoken's; both have that name."""

import re
from pathlib import Path

from alpaca.convert.families import Tokenizer
from alpaca.convert.sentencepieces import read_sentencepiece
from alpaca.convert.tiktokens import read_tiktoken
from alpaca.description import Vocabulary, is_tiktoken
from alpaca.errors import UserError

CHAT = re.compile(r"instruct|chat", re.IGNORECASE)


def read_vocabulary(
    path: Path, model: str, instruct: bool | None, *, leading_space: bool | None = None
) -> tuple[Vocabulary, Tokenizer]:
    """The vocabulary in a file, and its kind.

    Args:
        path: a `tokenizer.model`.
        model: name of the model's folder; decides whether it is a chat model if `instruct` is None.
        instruct: whether it is a chat model.
        leading_space: whether a text starts with a space; None uses the file's setting.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing.", "Put the tokenizer.model that came with the model there."
        )
    if not is_tiktoken(path):
        return read_sentencepiece(path, leading_space=leading_space), "sentencepiece"
    chat = CHAT.search(model) is not None if instruct is None else instruct
    return read_tiktoken(path, instruct=chat), "tiktoken"
