"""What a run reads, opened and shown before torch is imported.

Importing torch and transformers' models takes seconds. A wrong path, a damaged data set or a
tokenizer of another model is reported before that, and the examples are shown meanwhile.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alpaca.folder import check_folder, load_tokenizer
from alpaca.pairs import ANSWERS, Pair, read_pairs
from alpaca.plan.planner import CACHE
from alpaca.prompt import plain
from alpaca.recipe.arguments import DataFlags
from alpaca.recipe.corpus import Corpus, no_targets_left, open_corpus, split
from alpaca.records import Record, read_records
from alpaca.tokens import Codec


@dataclass(frozen=True)
class Data:
    """Indices of `corpus` to train on, and of `other` to evaluate on."""

    corpus: Corpus
    train: Sequence[int]
    other: Corpus
    held_out: Sequence[int]


@dataclass(frozen=True)
class Task:
    """A held-out task for `--eval_generations`: its text without the template, its prompt's ids."""

    text: str
    prompt: list[int]


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, the data set as token ids, and the tasks to answer at each evaluation."""

    codec: Codec
    data: Data
    tasks: Sequence[Task] = ()


def read(flags: DataFlags) -> Inputs:
    """Open tokenizer and data; the first rank shows what it will train on.

    Raises:
        UserError: no model folder, no tokenizer, or a data set that cannot be trained on.
    """
    check_folder(flags.model_name_or_path)
    codec = Codec(load_tokenizer(flags.tokenizer_name_or_path or flags.model_name_or_path))
    data = _split(flags, codec)
    tasks = _tasks(flags, data, codec)
    if os.environ.get("RANK", "0") == "0":
        _show(flags, data, codec)
    return Inputs(codec, data, tasks)


def _open(flags: DataFlags, data: Path, codec: Codec) -> Corpus:
    limit, joint = flags.model_max_length, flags.joint_tokenization
    return open_corpus(data, codec, CACHE, limit, joint=joint, pairs=flags.loss == "dpo")


def _split(flags: DataFlags, codec: Codec) -> Data:
    """The data set, with what is held out of it or read from a file of its own."""
    corpus = _open(flags, flags.data_path, codec)
    train, held_out = split(corpus, flags.eval_fraction, flags.seed)
    if not train:
        raise no_targets_left(flags.data_path, flags.model_max_length)
    if flags.eval_data_path:
        other = _open(flags, flags.eval_data_path, codec)
        evaluated, _ = split(other, 0.0, flags.seed)
        if not evaluated:
            raise no_targets_left(flags.eval_data_path, flags.model_max_length)
        return Data(corpus, train, other, evaluated)
    return Data(corpus, train, corpus, held_out)


def _tasks(flags: DataFlags, data: Data, codec: Codec) -> list[Task]:
    """The first held-out examples, as many as `--eval_generations` wants, or all that there are."""
    chosen = data.held_out[: flags.eval_generations]
    if not chosen:
        return []
    # The corpus holds no texts. Its notices about the file are shown elsewhere.
    path = flags.eval_data_path or flags.data_path
    records: Sequence[Record | Pair]
    records = (read_pairs if flags.loss == "dpo" else read_records)(path, lambda _: None)
    return [_task(records[i], codec) for i in chosen]


def _task(record: Record | Pair, codec: Codec) -> Task:
    asked = record.instruction, record.input
    return Task(plain(*asked), codec.prompt(*asked))


def _show(flags: DataFlags, data: Data, codec: Codec) -> None:
    """Print what was noticed in the data, and an example of each kind."""
    corpus = data.corpus
    for notice in dict.fromkeys([*corpus.notices, *data.other.notices]):
        print(f"train: {notice}")
    for kind, name in enumerate(("without input", "with input")):
        shown = next((i for i in data.train if corpus.kinds[i] == kind), None)
        if shown is not None:
            text = show_example(corpus, shown, codec)
            print(f"--- an example {name}, as it is trained on\n{text}\n")
    if data.other is not corpus and data.other.without_targets:
        print(
            f"train: {data.other.without_targets} of {len(data.other)} examples of "
            f"{flags.eval_data_path} have no answer token left (not evaluated)"
        )
    if flags.eval_generations > len(data.held_out):
        print(
            f"train: --eval_generations {flags.eval_generations}: only {len(data.held_out)} "
            "example(s) are held out; all of them are answered"
        )
    what = "examples"
    if corpus.rejected_lengths is not None:
        what = "preference pairs"
        if corpus.empty_outputs:
            print(f"train: {corpus.empty_outputs} pair(s) have an empty chosen answer")
    elif corpus.empty_outputs:
        print(
            f"train: {corpus.empty_outputs} example(s) have an empty output and teach to answer "
            "with nothing, as in 2023; a copy without them: python -m alpaca audit "
            f"{flags.data_path} --leave_out empty_output --write-clean clean.json"
        )
    print(
        f"train: {len(data.train)} {what}; {corpus.truncated} example(s) cut at "
        f"{flags.model_max_length} tokens, {corpus.without_targets} of them left without an "
        "answer token (not trained on)",
        flush=True,
    )


def show_example(corpus: Corpus, index: int, codec: Codec) -> str:
    """One example as the model sees it, each token by the tokenizer's name for it.

    First the masked prompt, then, in brackets, what is trained on: the answer, or both of a pair;
    EOS ends it unless it was cut.
    """
    prompt = int(corpus.prompt_lengths[index])
    shared = corpus.prefix_lengths[int(corpus.kinds[index])]
    masked = _names(corpus.example(index)[:prompt], codec)
    lines = [
        f"masked ({prompt} tokens, the first {shared} shared within a pack):",
        _wrapped(masked),
    ]
    answers = corpus.answers(index)
    for kind, ids in zip(("trained",) if len(answers) == 1 else ANSWERS, answers, strict=True):
        trained = [f"[{name}]" for name in _names(ids, codec)]
        if ids[-1] != codec.eos:
            trained.append("(cut off here)")
        lines += [f"{kind} ({len(ids)} tokens):", _wrapped(trained)]
    return "\n".join(lines)


def _names(ids: npt.NDArray[np.int32], codec: Codec) -> list[str]:
    names: list[str] = codec.tokenizer.convert_ids_to_tokens(ids.tolist())
    return names


def _wrapped(words: list[str]) -> str:
    return textwrap.fill(" ".join(words), 100, break_long_words=False, break_on_hyphens=False)
