"""Run all checks of an audit: on each record alone, on the whole set, and on token counts.

Checks of one record are regular expressions. Duplicates and languages need the whole set. Tokens
are counted by the trainer's own code, so a record reported as cut is one that training would cut.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca.dataset.checks import CHECKS, invalid, unread_key
from alpaca.dataset.findings import FIELDS, Audit, Finding, Text
from alpaca.dataset.language import language
from alpaca.dataset.near import exact_duplicates, near_duplicates
from alpaca.records import Record, notices, texts

CHUNK = 2000  # records tokenized at a time, which bounds the memory for their ids


def examine(
    items: Sequence[Any],
    tokenizer: Path | None,
    max_length: int,
    threshold: float,
    faults: Sequence[str | None] | None = None,
) -> Audit:
    """Check every record; count tokens only if the tokenizer's folder is given.

    `faults`: why each item cannot be read, where its reader has already said so.
    """
    faults = [invalid(item) for item in items] if faults is None else faults
    records = [_text(item, fault) for item, fault in zip(items, faults, strict=True)]
    findings = [Finding("invalid", index, fault) for index, fault in enumerate(faults) if fault]
    findings += [
        Finding("unread_key", index, why)
        for index, item in enumerate(items)
        if (why := unread_key(item))
    ]
    valid = [index for index, fault in enumerate(faults) if not fault]
    findings += [finding for index in valid for finding in _alone(index, records[index])]
    languages, foreign = _languages(records)
    findings += foreign
    findings += _duplicates(records, threshold)
    lengths = {
        f"{name} words": [len(text[place].split()) for text in records]
        for place, name in enumerate(FIELDS)
    }
    if tokenizer:
        lengths["tokens"] = _token_counts(records, tokenizer)
        findings += _too_long(lengths["tokens"], max_length)
    return Audit(
        count=len(items),
        findings=findings,
        with_input=sum(bool(text.input.strip()) for text in records),
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


def _languages(records: Sequence[Text]) -> tuple[dict[str, int], list[Finding]]:
    """Instructions per detected language, and a finding for each not in the commonest one."""
    found = {index: language(text.instruction) for index, text in enumerate(records)}
    detected = {index: code for index, code in found.items() if code}
    counts = Counter(detected.values())
    common = counts.most_common(1)[0][0] if counts else ""
    foreign = [
        Finding("language", index, f"the instruction is in {code!r}, the set in {common!r}")
        for index, code in detected.items()
        if code != common
    ]
    return dict(counts.most_common()), foreign


def _duplicates(records: Sequence[Text], threshold: float) -> list[Finding]:
    prompts = [f"{text.instruction}\n{text.input}" for text in records]
    exact = dict(exact_duplicates(prompts))
    found = []
    for index, first in exact.items():
        same = records[index].output.split() == records[first].output.split()
        answer = "the same answer" if same else "another answer"
        found.append(Finding("exact_duplicate", index, f"of record {first}, {answer}", first))
    for near in near_duplicates(prompts, set(exact), threshold):
        detail = f"of record {near.other}, ROUGE-L {near.score:.2f}"
        found.append(Finding("near_duplicate", near.index, detail, near.other))
    return found


def _token_counts(records: Sequence[Text], folder: Path) -> list[int]:
    """Tokens of prompt, answer and EOS of each record, as the trainer makes them."""
    from alpaca.folder import load_tokenizer  # imported here: it loads transformers
    from alpaca.tokens import Codec

    codec = Codec(load_tokenizer(folder))
    counts: list[int] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        # Not validated: the audit also reports what the trainer would refuse.
        unvalidated = [Record(**text._asdict()) for text in chunk]
        counts += [len(example.ids) for example in codec.examples(unvalidated, 1 << 40)]
    return counts


def _too_long(counts: Sequence[int], max_length: int) -> Iterator[Finding]:
    for index, count in enumerate(counts):
        if count - 1 > max_length:
            yield Finding(
                "truncated", index, f"{count - 1} tokens and the EOS, but only {max_length} fit"
            )
        if count > max_length:
            yield Finding("eos_cut", index, f"the EOS would be token {count} of {max_length}")
