"""Byte-level BPE: how Llama 3, SmolLM2 and their kin cut text, from tiktoken or GGUF vocabularies.

A vocabulary file says which byte strings are tokens. How a text is first cut into words is code in
the model's own tokenizer, not data, so those patterns are listed here by their GGUF names.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# The GPT-2 pattern (Radford et al., 2019) is built into ByteLevel(use_regex=True).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_GPT2: list[pre_tokenizers.PreTokenizer] = [
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
]
PATTERNS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *_GPT2],
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}


def byte_level(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pattern: str,
    *,
    whole_words: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        vocab: token -> id; bytes are spelled with GPT-2's printable stand-ins.
        merges: pairs in order of rank.
        pattern: a key of PATTERNS.
        whole_words: a word that is a token is taken whole, as tiktoken does.
    """
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)
    tokenizer = Tokenizer(model)
    parts = PATTERNS[pattern]
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _printable() -> list[str]:
    """GPT-2's stand-in character for each byte: itself where printable, else from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(stand_ins)) for byte in range(256)]


_PRINTABLE = _printable()


def spell(word: bytes) -> str:
    """A byte string as byte-level vocabularies write it."""
    return "".join(_PRINTABLE[byte] for byte in word)
