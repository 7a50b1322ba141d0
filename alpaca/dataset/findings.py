"""An audit's findings as plain data, from which every report and the cleaned copy are made.

No third-party import, so that `--help` and reports need nothing installed.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from alpaca.datafile import FIELDS

__all__ = ["FIELDS", "MEANINGS", "NEAR", "Audit", "Finding", "Text"]

NEAR = 0.9  # ROUGE-L from which two records count as near duplicates

# check: what it means, in the order of the report
MEANINGS = {
    "invalid": "Not an object with the texts instruction, output and, optionally, input.",
    "unread_key": "Has a key that is not read and changes what the record means.",
    "empty_instruction": "Nothing is asked.",
    "empty_output": "Nothing is answered.",
    "placeholder": "A placeholder is in place of an answer or an input.",
    "thinking": "The answer still contains a model's reasoning.",
    "refusal": "The answer declines, or speaks as a model.",
    "leaked_template": "Prompt template or control tokens inside a field.",
    "encoding": "Characters that were lost, decoded wrongly (mojibake), or are useless in text.",
    "missing_input": "The instruction refers to a text that is missing.",
    "repeated_text": "One field is a copy of another, or the instruction holds the input as well.",
    "merged_fields": "Several fields of a record are merged into one.",
    "language": "The instruction is in another language than most of the set.",
    "exact_duplicate": "Asks the same as an earlier record, word for word.",
    "near_duplicate": "Asks nearly the same as an earlier record (ROUGE-L of instruction + input).",
    "truncated": "Longer than the token limit: the answer is cut in training.",
    "eos_cut": "The EOS falls beyond the token limit: the model is not shown where to stop.",
}


class Text(NamedTuple):
    """A record's three texts; "" where a field is absent or not text."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What `check` found in record `index` (from 0); `other` is the record it resembles."""

    check: str
    index: int
    detail: str
    other: int | None = None


@dataclass
class Audit:
    """What was found in a data set of `count` records, and the figures behind the plots."""

    count: int
    findings: list[Finding]
    with_input: int
    languages: dict[str, int]
    lengths: dict[str, list[int]] = field(repr=False)  # "instruction words" -> one number a record
    max_length: int | None = None
    notices: list[str] = field(default_factory=list)  # what is read in another form, or not at all

    def by_check(self) -> dict[str, list[Finding]]:
        """Findings of each check that found something, in the report's order."""
        found: dict[str, list[Finding]] = {name: [] for name in MEANINGS}
        for finding in self.findings:
            found[finding.check].append(finding)
        return {name: findings for name, findings in found.items() if findings}
