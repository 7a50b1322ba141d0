"""Root verb and direct object of an instruction, from spaCy's dependency parse.

The verb is that of the first sentence that asks for something (an imperative or a question), the
object its noun: "Given a title, write a short poem about it." is (write, poem). Quoted text, and
text after a colon or a line end, is what the request is about, so it is not parsed. A sentence
whose first verb was tagged as a noun is parsed again after "You must".
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from alpaca.errors import UserError

PREFERRED = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")
BATCH = 512
SINGLE_PROCESS = 4 * BATCH  # below this a second process costs more than it saves

QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|(?<!\w)'[^']*'(?!\w)|‘[^’]*’(?!\w)|`[^`]*`")

# Dependency labels of an imperative that was parsed as the start of a noun phrase.
NOT_A_ROOT = ("compound", "amod", "dep", "nmod", "nsubj", "npadvmod", "advmod", "advcl")


class Asked(NamedTuple):
    """Lemmas of root verb and direct object; "" where the parse has none."""

    verb: str
    object: str


def find_model(name: str | None = None) -> str:
    """The installed English model to parse with: the one named, or else the smallest installed.

    Raises:
        UserError: it is not installed; the remedy is the one command that installs it.
    """
    import spacy

    installed = {str(model) for model in spacy.util.get_installed_models()}
    english = sorted(model for model in installed if model.startswith("en_core_web_"))
    for model in (name,) if name else (*PREFERRED, *english):
        if model in installed:
            return model
    raise UserError(
        f"spaCy's English model {name or PREFERRED[0]} is not installed.",
        f"python -m spacy download {name or PREFERRED[0]}",
    )


def model_version(name: str) -> str:
    """Name and version of an installed model: a figure is reproducible only with both."""
    import spacy

    return f"{name} {spacy.util.get_package_version(name)}"


def parse_all(
    instructions: Sequence[str],
    model: str,
    progress: Callable[[int], None] = lambda done: None,
    processes: int | None = None,
) -> list[Asked]:
    """Verb and object of each instruction, on all cores; `progress` gets batch sizes."""
    batches = [list(instructions[at : at + BATCH]) for at in range(0, len(instructions), BATCH)]
    cores = min(len(os.sched_getaffinity(0)), len(batches))
    processes = processes or (cores if len(instructions) > SINGLE_PROCESS else 1)
    found: list[Asked] = []
    for asked in _results(batches, model, processes):
        found += asked
        progress(len(asked))
    return found


def _results(batches: list[list[str]], model: str, processes: int) -> Iterator[list[Asked]]:
    if processes <= 1:
        nlp = _load(model)
        yield from (_parse(nlp, batch) for batch in batches)
        return
    # Spawned, not forked: a fork inherits locks that are held by threads it does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _initialize, (model,)) as pool:
        yield from pool.map(_parse_here, batches)


_nlp: Any = None  # a worker process's own pipeline


def _initialize(model: str) -> None:
    global _nlp
    _nlp = _load(model)


def _parse_here(batch: list[str]) -> list[Asked]:
    return _parse(_nlp, batch)


def _load(model: str) -> Any:
    import spacy

    return spacy.load(model, exclude=["ner", "senter"])


def _parse(nlp: Any, batch: list[str]) -> list[Asked]:
    plain = [request_of(text) for text in batch]
    found = [asked(doc) for doc in nlp.pipe(plain)]
    untagged = [
        number
        for number, item in enumerate(found)
        if item is None and plain[number] and not plain[number].endswith("?")
    ]
    texts = [f"You must {plain[number][:1].lower()}{plain[number][1:]}" for number in untagged]
    for number, doc in zip(untagged, nlp.pipe(texts), strict=True):
        found[number] = asked(doc, again=True)
    return [item or Asked("", "") for item in found]


def request_of(instruction: str) -> str:
    """The request in an instruction, without the text it is about."""
    first = next((line for line in instruction.splitlines() if line.strip()), "").strip()
    plain = QUOTED.sub(lambda quote: quote[0] if quote[0].count(" ") < 2 else "this", first)
    head, _, _ = plain.partition(": ")
    head = head if len(head.split()) > 2 else plain
    head = re.sub(r"\b([Rr]e)-(?=[a-z])", r"\1", head)  # "re-write" would be two words
    return re.sub(r"\s+", " ", head).strip(" :-*#")


def asked(doc: Any, *, again: bool = False) -> Asked | None:
    """Verb and object of the first sentence that asks for something; None without a verb."""
    roots = [sentence.root for sentence in doc.sents]
    verbs = [root for root in roots if root.pos_ in ("VERB", "AUX") or _object(root)]
    if again:
        verbs = [root for root in roots if root.pos_ in ("VERB", "AUX")]
    if not verbs or (not again and _noun_like_start(doc)):
        return None
    root = next((root for root in verbs if again or _asks(root)), verbs[0])
    if root.lemma_ in ("need", "have", "want"):  # "you need to find ..." asks to find
        root = next((child for child in root.children if child.dep_ == "xcomp"), root)
    return Asked(root.lemma_.lower(), _object(root))


def _noun_like_start(doc: Any) -> bool:
    """Whether the first word looks like an imperative that was tagged as something else."""
    first = doc[0]
    return (
        first.pos_ in ("NOUN", "PROPN", "ADJ")
        and first.dep_
        in ("compound", "amod", "dep", "nmod", "nsubj", "npadvmod", "advmod", "advcl")
        and not any(token.dep_ in ("det", "poss", "nummod") for token in first.children)
        and not first.doc.text.rstrip().endswith("?")
    )


def _asks(root: Any) -> bool:
    """Whether a sentence is an imperative (no subject) or a question (ends in `?`)."""
    subjects = {"nsubj", "nsubjpass", "expl", "csubj"}
    question = root.sent.text.rstrip().endswith("?")
    return question or not any(child.dep_ in subjects for child in root.children)


def _object(verb: Any) -> str:
    """Lemma of the verb's direct object, or of one it shares with a verb joined by `and`."""
    for child in verb.children:
        if child.dep_ in ("dobj", "obj") and child.pos_ in ("NOUN", "PROPN"):
            return str(child.lemma_.lower())
    for child in verb.children:
        if child.dep_ == "conj" and child.pos_ == "VERB" and child.i - verb.i <= 2:
            return _object(child)
    return ""
