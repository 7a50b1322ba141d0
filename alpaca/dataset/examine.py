"""Everything an audit looks at: each record by itself, then records together, then their tokens.

Checks of one record are regular expressions; duplicates and languages need the whole set; tokens
are counted by the trainer's own code, so what is said to be cut is what training would cut.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from alpaca.dataset.checks import CHECKS, invalid, unread_key
from alpaca.dataset.findings import FIELDS, Audit, Finding, Text
from alpaca.dataset.near import exact_duplicates, near_duplicates
from alpaca.records import Record, notices, texts

LANGUAGE_LETTERS = 25  # shorter instructions are too little to tell a language by
LANGUAGE_CERTAINTY = 0.95
CHUNK = 2000  # records tokenized at a time: bounds the memory their ids take


def examine(
    items: Sequence[Any], tokenizer: Path | None, max_length: int, threshold: float
) -> Audit:
    """Look at every record; tokens only with a tokenizer's folder."""
    faults = [invalid(item) for item in items]
    said = [_text(item, fault) for item, fault in zip(items, faults, strict=True)]
    findings = [Finding("invalid", index, fault) for index, fault in enumerate(faults) if fault]
    findings += [Finding("unread_key", index, why) for index, item in enumerate(items)
                 if (why := unread_key(item))]  # fmt: skip
    whole = [index for index, fault in enumerate(faults) if not fault]
    findings += [finding for index in whole for finding in _alone(index, said[index])]
    languages, foreign = _languages(said)
    findings += foreign
    findings += _duplicates(said, threshold)
    lengths = {f"{name} words": [len(text[place].split()) for text in said]
               for place, name in enumerate(FIELDS)}  # fmt: skip
    if tokenizer:
        lengths["tokens"] = _token_counts(said, tokenizer)
        findings += _too_long(lengths["tokens"], max_length)
    return Audit(
        count=len(items),
        findings=findings,
        with_input=sum(bool(text.input.strip()) for text in said),
        languages=languages,
        lengths=lengths,
        max_length=max_length if tokenizer else None,
        notices=notices(items),
    )


def _text(item: Any, fault: str | None) -> Text:
    return Text("", "", "") if fault else Text(**texts(item))


def _alone(index: int, text: Text) -> Iterator[Finding]:
    for name, check in CHECKS.items():
        detail = check(text)
        if detail:
            yield Finding(name, index, detail)


def _languages(said: Sequence[Text]) -> tuple[dict[str, int], list[Finding]]:
    """How many instructions are surely in which language, and those not in the commonest one."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    sure: dict[int, str] = {}
    for index, text in enumerate(said):
        plain = _main_script(text.instruction)
        if sum(map(str.isalpha, plain)) >= LANGUAGE_LETTERS:
            language, certainty = identifier.classify(plain)
            if certainty >= LANGUAGE_CERTAINTY:
                sure[index] = language
    counts = Counter(sure.values())
    common = counts.most_common(1)[0][0] if counts else ""
    foreign = [
        Finding("language", index, f"the instruction is in {language!r}, the set in {common!r}")
        for index, language in sure.items()
        if language != common
    ]
    return dict(counts.most_common()), foreign


def _main_script(text: str) -> str:
    """A text in Latin letters without the words of other scripts that it quotes."""
    latin = re.sub(r"[^\x00-\u024f\u2000-\u206f]+", "", text)
    return latin if sum(map(str.isalpha, latin)) * 2 > sum(map(str.isalpha, text)) else text


def _duplicates(said: Sequence[Text], threshold: float) -> list[Finding]:
    asked = [f"{text.instruction}\n{text.input}" for text in said]
    exact = dict(exact_duplicates(asked))
    found = []
    for index, first in exact.items():
        same = said[index].output.split() == said[first].output.split()
        answer = "the same answer" if same else "another answer"
        found.append(Finding("exact_duplicate", index, f"of record {first}, {answer}", first))
    for near in near_duplicates(asked, set(exact), threshold):
        detail = f"of record {near.other}, ROUGE-L {near.score:.2f}"
        found.append(Finding("near_duplicate", near.index, detail, near.other))
    return found


def _token_counts(said: Sequence[Text], folder: Path) -> list[int]:
    """Tokens of prompt, answer and EOS of each record, as the trainer makes them."""
    from alpaca.model import load_tokenizer  # these bring PyTorch in
    from alpaca.tokens import Codec

    codec = Codec(load_tokenizer(folder))
    counts: list[int] = []
    for start in range(0, len(said), CHUNK):
        chunk = said[start : start + CHUNK]
        # Not validated: the audit tells of what the trainer would refuse.
        records = [Record(**text._asdict()) for text in chunk]
        counts += [len(example.ids) for example in codec.examples(records, 1 << 40)]
    return counts


def _too_long(counts: Sequence[int], max_length: int) -> Iterator[Finding]:
    for index, count in enumerate(counts):
        if count - 1 > max_length:
            yield Finding("truncated", index, f"{count - 1} tokens and the EOS, {max_length} fit")
        if count > max_length:
            yield Finding("eos_cut", index, f"the EOS would be token {count} of {max_length}")
