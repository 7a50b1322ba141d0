"""The language of a text, where it is long and plain enough to tell."""

import re
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

LETTERS = 25  # the language of shorter texts is not detected
CERTAINTY = 0.95


def language(text: str) -> str | None:
    """ISO 639-1 code of the language, or None if that is not clear."""
    plain = _main_script(text)
    if sum(map(str.isalpha, plain)) < LETTERS:
        return None
    code, certainty = _identifier().classify(plain)
    return str(code) if certainty >= CERTAINTY else None


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _main_script(text: str) -> str:
    """A mostly Latin text without the words of other scripts that it quotes; else the text."""
    latin = re.sub(r"[^\x00-\u024f\u2000-\u206f]+", "", text)
    return latin if sum(map(str.isalpha, latin)) * 2 > sum(map(str.isalpha, text)) else text
