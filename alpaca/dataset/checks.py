"""Checks of a single record that need only its text: one small function for each defect.

The patterns are narrow on purpose, because each finding should be worth a look: a record that talks
about a template, quotes an apology or answers in another language passes. A check returns what it
found, or None.
"""

import re
from collections.abc import Callable
from typing import Any

from ftfy.badness import is_bad

from alpaca.dataset.findings import FIELDS, Text
from alpaca.dataset.reply import THOUGHT_MARK
from alpaca.records import faults, named, unread

PLACEHOLDER = re.compile(
    r"\W*(?:no ?output|output|n/?a|null|nan|nil|todo|tbd|fixme|placeholder|answer|response"
    r"|(?:your|insert|enter|add|write)\b[\w ]{0,30}\bhere|lorem ipsum\b.*|[.…?_-]*)\W*",
    flags=re.IGNORECASE | re.DOTALL,
)
BLANK_TO_FILL = re.compile(
    r"[\[<{](?:insert|your|enter|add)\b[^\]>}\n]{0,40}[\]>}]", flags=re.IGNORECASE
)
# Template variables, and names in capitals that should have been replaced by a real name.
_NAME = "(?:NAME|AUTHOR|COMPANY|ORGANI[ZS]ATION|DEVELOPER|(?:BOT|MODEL|USER|ASSISTANT)[_ ]?NAME)"
UNFILLED = re.compile(
    r"(?<![\w}\\])\{\{\s*[A-Za-z_][\w .-]{0,38}\}\}"
    rf"|[\[<{{]{{1,2}}{_NAME}[\]>}}]{{1,2}}"
    r"|(?i:\b(?:(?:my|your|his|her|its) name is|i am|i'm|call me|known as"
    rf"|(?:developed|built|created|made|trained|designed|owned) by)) [\"'*_]{{0,3}}{_NAME}\b"
)
TEMPLATE_CODE = re.compile(r"```|</\w+>|\{%")  # an answer may be code with such variables
NO_INPUT = re.compile(r"\W*(?:no ?input|n/?a|none|null|nan|nil|empty)\W*", flags=re.IGNORECASE)

REFUSAL = re.compile(
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:(?:i'm|i am|we're) (?:\w+ )?(?:sorry|afraid)|sorry|apologies|i apologi[sz]e)\b"
    r"[^.!?\n]{0,40}?\b(?:i|we) (?:can(?:'t|not| not)|am unable|'m unable|am not able|'m not able"
    r"|do not have|don't have|could(?:n't| not)|won't|will not)\b"
    r"|i(?: am|'m) (?:unable|not able) to\b"
    r"|i (?:can't|cannot|can not|won't|will not) (?:help|assist|provide|fulfil|generate|create"
    r"|complete|comply|answer|do that|do this|access|see|view|open|browse)\b",
    flags=re.IGNORECASE,
)
AS_A_MODEL = re.compile(r"\bas an? (?:ai|large) (?:language )?model\b", flags=re.IGNORECASE)

TEMPLATE = re.compile(
    r"^#{2,3} ?(?:instruction|input|response):"
    r"|below is an instruction that describes a task"
    r"|<\|(?:im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|system|user|assistant)\|>"
    r"|\[/?INST\]|<</?SYS>>|<s>\s*\[INST|</s>\s*\Z",
    flags=re.IGNORECASE | re.MULTILINE,
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")

# An instruction that refers to a text: "the following paragraph", "the list below".
POINTS = re.compile(
    r"\b(?:(?:the|these|this) (?:following|given|provided|attached)"
    r"|(?<!\ba )(?:following|given|provided)"
    r"|(?:the|this|these) (?:\w+ )?(?=\w+ (?:below|above)\b))"
    r" ?(?:\w+ )?(?:text|sentences?|paragraphs?|passages?|articles?|words?|lists?|numbers?|code"
    r"|poems?|stor(?:y|ies)|statements?|phrases?|dialogues?|conversations?|emails?|reviews?|tables?"
    r"|data|questions?|equations?|quotes?|tweets?|functions?|items?|documents?|essays?)\b",
    flags=re.IGNORECASE,
)
# Signs that the instruction holds that text itself.
CARRIES = re.compile(r"[:\n\"“”'‘«»`\d=]|\(|\s-\s|,.*,")
MERGED = re.compile(r"^\W*(?:input|output|response)\W*:", flags=re.IGNORECASE | re.MULTILINE)


def invalid(item: Any) -> str | None:
    """What training refuses, except an empty instruction, which has its own check."""
    found = [why for why in faults(item) if why != "instruction: is empty"]
    return "; ".join(found) or None


def unread_key(item: Any) -> str | None:
    """A key that is not read and changes what the record means."""
    return "; ".join(f"{named(key)}: {why}" for key, why in unread(item).items()) or None


def empty_instruction(text: Text) -> str | None:
    """Nothing is asked."""
    return None if text.instruction.strip() else "the instruction is empty"


def empty_output(text: Text) -> str | None:
    """Nothing is answered."""
    return None if text.output.strip() else "the output is empty"


def placeholder(text: Text) -> str | None:
    """A placeholder instead of an answer or an input."""
    output, given = text.output.strip(), text.input.strip()
    if output and len(output) < 80 and PLACEHOLDER.fullmatch(output):
        return f"the output is {output!r}"
    if given and NO_INPUT.fullmatch(given):
        return f"the input is {given!r}"
    for pattern in (BLANK_TO_FILL, UNFILLED):
        blank = pattern.search(text.output)
        asked = pattern.search(text.instruction) or pattern.search(text.input)
        code = pattern is UNFILLED and TEMPLATE_CODE.search(text.output)
        if blank and not asked and not code:
            return f"the output leaves {blank[0]!r} to fill in"
    return None


def thinking(text: Text) -> str | None:
    """A model's thoughts left in the answer."""
    found = THOUGHT_MARK.search(text.output)
    if not found or THOUGHT_MARK.search(text.instruction) or THOUGHT_MARK.search(text.input):
        return None
    return f"the output holds {found[0]!r}"


def refusal(text: Text) -> str | None:
    """The answer declines, or speaks as a model."""
    plain = text.output.replace("’", "'").strip()
    found = REFUSAL.match(plain) or AS_A_MODEL.search(plain)
    return f"{found[0]!r}" if found else None


def leaked_template(text: Text) -> str | None:
    """Prompt template or control tokens inside a field."""
    for field, content in zip(FIELDS, text, strict=True):
        if found := TEMPLATE.search(content):
            return f"{field} holds {found[0].strip()!r}"
    return None


def encoding(text: Text) -> str | None:
    """Characters lost, decoded wrongly (mojibake) or of no use in text."""
    for field, content in zip(FIELDS, text, strict=True):
        if content.isascii() and content.isprintable():
            continue
        if "\ufffd" in content:
            return f"{field} holds U+FFFD, a character that was lost"
        if found := CONTROL.search(content):
            return f"{field} holds the control character U+{ord(found[0]):04X}"
        if is_bad(content):
            return f"{field} looks like UTF-8 that was decoded as something else"
    return None


def missing_input(text: Text) -> str | None:
    """The instruction refers to a text that is missing."""
    found = POINTS.search(text.instruction)
    if not found or text.input.strip() or CARRIES.search(text.instruction):
        return None
    return f"{found[0]!r}, but there is no input"


def repeated_text(text: Text) -> str | None:
    """One field is a copy of another, or the instruction and the input contain one another."""
    instruction, given, output = (" ".join(part.casefold().split()) for part in text)
    if given and given == instruction:
        return "the input is the instruction"
    if output and output == instruction:
        return "the output is the instruction"
    # Compared exactly: an answer may be the input with its capitals or line breaks corrected.
    if len(given.split()) > 3 and text.input.strip() == text.output.strip():
        return "the output is the input"
    if len(given.split()) > 3 and given in instruction:
        return "the instruction holds the input as well"
    if len(instruction.split()) > 3 and instruction in given:
        return "the input holds the instruction as well"
    return None


def merged_fields(text: Text) -> str | None:
    """Several fields of a record are merged into one."""
    found = MERGED.search(text.instruction)
    if found:
        return f"the instruction holds {found[0].strip()!r}"
    found = re.match(r"\W*(?:output|response)\W{0,3}:", text.output, flags=re.IGNORECASE)
    return f"the output begins with {found[0].strip()!r}" if found else None


# Run on each record alone; the key is the check's name in reports and options.
CHECKS: dict[str, Callable[[Text], str | None]] = {
    "empty_instruction": empty_instruction,
    "empty_output": empty_output,
    "placeholder": placeholder,
    "thinking": thinking,
    "refusal": refusal,
    "leaked_template": leaked_template,
    "encoding": encoding,
    "missing_input": missing_input,
    "repeated_text": repeated_text,
    "merged_fields": merged_fields,
}
