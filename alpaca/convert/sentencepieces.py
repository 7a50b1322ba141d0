"""Convert SentencePiece BPE vocabularies (LLaMA 1 and 2, Mistral v1) to fast tokenizers.

SentencePiece merges the adjacent pair whose merged piece has the best score; a fast tokenizer needs
a ranked list of merges. So every split of a piece into two pieces becomes a merge, ranked by the
piece's score. The order of merging is the same (Kudo & Richardson, "SentencePiece", 2018).
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from alpaca.description import Vocabulary
from alpaca.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
SPACE = "\u2581"  # ▁
Piece = tuple[str, float, int]  # text, score, kind


def read_sentencepiece(path: Path, *, leading_space: bool | None = None) -> Vocabulary:
    """The vocabulary of a `tokenizer.model`, with its special tokens.

    `leading_space` overrides the file's setting for a space before every text.

    Raises:
        UserError: the file is damaged, or is not plain BPE as LLaMA uses it.
    """
    proto = parse(path)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    # protobuf returns bytes where a string is not UTF-8
    if len({text for text, _, _ in pieces if isinstance(text, str)}) != len(pieces):
        raise UserError(f"{path} is damaged: it holds a piece twice.", "Fetch it again.")
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    plain = not rules.precompiled_charsmap and not rules.remove_extra_whitespaces
    if not pieces or trainer.model_type != BPE or not plain or not rules.escape_whitespaces:
        raise UserError(
            f"{path} is not a plain SentencePiece BPE model like LLaMA's.",
            "Check that it belongs to this model.",
        )
    special = [
        pieces[index][0]
        for index in (trainer.unk_id, trainer.bos_id, trainer.eos_id)
        if 0 <= index < len(pieces) and pieces[index][2] in (UNKNOWN, CONTROL)
    ]
    if len(special) != 3:
        raise UserError(f"{path} lacks <unk>, <s> or </s>.", "Check that it belongs to this model.")
    return Vocabulary(
        sentencepiece_bpe(
            pieces,
            leading_space=rules.add_dummy_prefix if leading_space is None else leading_space,
        ),
        unk=special[0],
        bos=special[1],
        eos=special[2],
        sentencepiece=path,
    )


def parse(path: Path) -> Any:
    """The message in a `tokenizer.model`; raises UserError if it is damaged."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is damaged.", "Fetch the file again.") from None
    return proto


def sentencepiece_bpe(pieces: Sequence[Piece], *, leading_space: bool) -> Tokenizer:
    """A fast tokenizer that encodes as SentencePiece does.

    Args:
        pieces: in order of id.
        leading_space: whether to put a space before every text.
    """
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    ranked = sorted(
        (index for index, piece in enumerate(pieces) if piece[2] == NORMAL),
        key=lambda index: (-pieces[index][1], index),
    )
    unk = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab,
        merges=pairs([pieces[index][0] for index in ranked]),
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )
    tokenizer = Tokenizer(model)
    escape: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    prefix: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if leading_space else []
    tokenizer.normalizer = normalizers.Sequence(prefix + escape)
    unescape = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if leading_space else []
    tokenizer.decoder = decoders.Sequence(unescape + strip)
    _add_special(tokenizer, pieces)
    return tokenizer


def _add_special(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> None:
    for text, _, kind in pieces:
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=SPACE in text)])


def pairs(ranked: Collection[str]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, in the order of `ranked` (best first).

    The splits of one token are ordered by the ranks of their parts, as in byte-level merge files.
    """
    rank = {token: number for number, token in enumerate(ranked)}
    merges = []
    for token in ranked:
        splits = [(token[:middle], token[middle:]) for middle in range(1, len(token))]
        known = [split for split in splits if split[0] in rank and split[1] in rank]
        merges += sorted(known, key=lambda split: (rank[split[0]], rank[split[1]]))
    return merges
