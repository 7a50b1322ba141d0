"""Streaming detokenization: no incomplete characters, and no part of a stop string.

In both supported tokenizer families (byte-level BPE; SentencePiece with byte fallback), a token
that follows a prompt always stands for the same bytes. So text is decoded byte by byte, in constant
time per token, instead of decoding the whole growing sequence again.
"""

import codecs
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alpaca.errors import UserError

SPACE = "▁"  # SentencePiece's character for a space


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes each token adds to a text; control tokens add none.

    Raises:
        UserError: the tokenizer's decoder is not supported.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = _decoder_kinds(definition["decoder"])
    if "ByteLevel" in kinds:
        spell = _spell_byte_level
    elif kinds & {"ByteFallback", "Metaspace"}:
        spell = _spell_sentencepiece
    else:
        raise UserError(
            f"The tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported.",
            "Byte-level BPE and SentencePiece tokenizers are.",
        )
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        table[index] = spell(token)
    for added in definition["added_tokens"]:
        table[added["id"]] = b"" if added["special"] else added["content"].encode()
    return table


def _decoder_kinds(decoder: dict[str, object] | None) -> set[str]:
    if decoder is None:
        return set()
    inner = decoder.get("decoders", [])
    assert isinstance(inner, list)
    return {str(decoder["type"])}.union(*(_decoder_kinds(part) for part in inner))


def _byte_alphabet() -> dict[str, int]:
    """The printable character for each byte in byte-level BPE (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


ALPHABET = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


class TextStream:
    """The text of one answer: takes tokens, returns pieces of text that are final."""

    def __init__(self, table: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        """`table` comes from `token_bytes`; empty stop strings are ignored."""
        self._table = table
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now final; sets `stopped` at a stop string."""
        return self.add(self._decoder.decode(self._table[token]))

    def add(self, text: str) -> str:
        """Add characters; as `push`."""
        if self.stopped:
            return ""
        self._pending += text
        found = [at for at in map(self._pending.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            piece, self._pending = self._pending[: min(found)], ""
            return piece
        final = len(self._pending) - self._possible_stop()
        piece, self._pending = self._pending[:final], self._pending[final:]
        return piece

    def finish(self) -> str:
        """The rest of the text, which was held back because it might begin a stop string.

        The bytes of an incomplete character are dropped.
        """
        piece, self._pending = self._pending, ""
        return piece

    def _possible_stop(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(text[:size]):
                    longest = size
                    break
        return longest
