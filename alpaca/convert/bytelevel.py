"""Byte-level BPE tokenizers (Llama 3, SmolLM2 and others) from tiktoken or GGUF vocabularies.

A vocabulary file lists the byte strings that are tokens. It does not say how a text is first split
into words: that is code in the model's own tokenizer. So this module lists the patterns by their
GGUF names.
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
        vocab: token -> id; bytes are written as GPT-2's printable characters.
        merges: pairs in order of rank.
        pattern: a key of PATTERNS.
        whole_words: a word that is in the vocabulary becomes one token without merging, as in
            tiktoken.
    """
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)
    tokenizer = Tokenizer(model)
    parts = PATTERNS[pattern]
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _printable() -> list[str]:
    """GPT-2's character for each byte: the byte itself if printable, else one from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(replacements)) for byte in range(256)]


_PRINTABLE = _printable()


def spell(word: bytes) -> str:
    """Write a byte string the way byte-level vocabularies do."""
    return "".join(_PRINTABLE[byte] for byte in word)
