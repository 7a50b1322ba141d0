"""A folder's tokenizer as metadata of a GGUF file, in llama.cpp's terms.

llama.cpp tokenizes by itself. A SentencePiece vocabulary needs a score for each piece, which
tokenizer.json lacks: it comes from `tokenizer.model`, or is derived from the order of the merges. A
byte-level vocabulary needs the name of the pattern that splits a text into words.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from alpaca import stored
from alpaca.convert import bytelevel
from alpaca.convert.sentencepieces import SPACE, parse
from alpaca.description import sentencepiece_file
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.tokens import Codec, without_leading_space

# In the order in which the names are tried; some name the same pattern.
NAMES = ("llama-bpe", "qwen2", "smollm", "gpt-2")
ELSEWHERE = "llama.cpp's own converter, convert_hf_to_gguf.py, may know it."
Kind = gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    model: "llama" for SentencePiece, "gpt2" for byte-level; kinds: of each token; scores: of each
    SentencePiece token; merges and pattern: of a byte-level vocabulary.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]
    adds_bos: bool
    chat_template: str | None
    leading_space: bool = False
    scores: list[float] | None = None
    merges: list[str] | None = None
    pattern: str = "default"

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys that begin with `tokenizer.`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pattern)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for role, index in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_space_prefix(self.leading_space)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder whose embedding has `rows` rows.

    Raises:
        UserError: llama.cpp has no tokenizer that splits texts as this one does.
    """
    tokenizer = load_tokenizer(folder)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = definition["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"{folder}: the tokenizer is {bpe['type']}, not BPE.", ELSEWHERE)
    vocabulary: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"{folder}: the tokenizer has {max(vocabulary.values()) + 1:,} tokens, the embedding "
            f"{rows:,} rows.",
            "Check that both belong to the same model.",
        )
    shared: dict[str, Any] = {
        "ids": _roles(folder, tokenizer),
        "adds_bos": Codec(tokenizer).bos is not None,
        "chat_template": tokenizer.chat_template,
    }
    if bpe.get("byte_fallback"):
        return _sentencepiece(folder, definition, vocabulary, rows, shared)
    tokens, kinds = _tokens(definition, vocabulary, rows)
    return Vocabulary(
        "gpt2",
        tokens,
        kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]],
        pattern=_pattern(folder, definition),
        **shared,
    )


def _roles(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Ids of the control tokens, by llama.cpp's names; a second stop ends a turn there."""
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    settings = folder / "generation_config.json"
    stops = stored.read_json(settings).get("eos_token_id") if settings.is_file() else None
    others = [stop for stop in stops if stop != found["eos"]] if isinstance(stops, list) else []
    if others:
        found["eot"] = others[0]
    return {role: index for role, index in found.items() if index is not None}


def _tokens(
    definition: dict[str, Any], vocabulary: dict[str, int], rows: int
) -> tuple[list[str], list[int]]:
    """Text and kind of each row's token; rows without one get a name that no text becomes."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [int(Kind.UNUSED)] * rows
    for text, index in vocabulary.items():
        tokens[index], kinds[index] = text, int(Kind.NORMAL)
    for added in definition["added_tokens"]:
        kinds[added["id"]] = int(Kind.CONTROL if added["special"] else Kind.USER_DEFINED)
    return tokens, kinds


def _sentencepiece(
    folder: Path,
    definition: dict[str, Any],
    vocabulary: dict[str, int],
    rows: int,
    shared: dict[str, Any],
) -> Vocabulary:
    tokens, kinds = _tokens(definition, vocabulary, rows)
    merges, unk = definition["model"]["merges"], definition["model"].get("unk_token")
    scores = _scores(folder, tokens, merges)
    for index, text in enumerate(tokens):
        if text == unk:
            kinds[index] = int(Kind.UNKNOWN)
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[index] = int(Kind.BYTE)
        elif kinds[index] == Kind.USER_DEFINED:  # llama.cpp looks for it before it escapes spaces
            tokens[index] = text.replace(SPACE, " ")
    return Vocabulary(
        "llama",
        tokens,
        kinds,
        scores=scores,
        leading_space=without_leading_space(definition) != definition,
        **shared,
    )


def _scores(folder: Path, tokens: list[str], merges: list[Any]) -> list[float]:
    """The score of each piece: the file's, or minus the rank of the first merge that makes it."""
    path = sentencepiece_file(folder)
    if path is not None:
        known = {piece.piece: float(piece.score) for piece in parse(path).pieces}
    else:
        known = {}
        for merge in merges:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            known.setdefault(left + right, float(-len(known)))
    lowest = min(known.values(), default=0.0) - 1
    return [known.get(token, lowest) for token in tokens]


def _pattern(folder: Path, definition: dict[str, Any]) -> str:
    """llama.cpp's name of the pattern with which a tokenizer splits words."""
    wanted = _steps(definition["pre_tokenizer"])
    for name in NAMES:
        whole_words = name == "llama-bpe"
        if bool(definition["model"].get("ignore_merges")) != whole_words:
            continue
        ours: Tokenizer = bytelevel.byte_level({"a": 0}, [], name)
        if _steps(json.loads(ours.to_str())["pre_tokenizer"]) == wanted:
            return name
    raise UserError(
        f"{folder}: the tokenizer splits texts into words in a way that has no name here.",
        ELSEWHERE,
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what does not change a token."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for child in part["pretokenizers"] for step in _steps(child)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]
