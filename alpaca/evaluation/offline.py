"""A model folder answers a suite through the engine, in this process and without HTTP.

More slots than a server has, each as short as the suite allows: nobody waits for a first token, so
tokens per second are all that counts. The reference answers are scored with the same loaded model.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from alpaca import passport, stored
from alpaca.errors import UserError
from alpaca.evaluation.suites import Task, seed_of
from alpaca.folder import check_folder
from alpaca.records import Record
from alpaca.serving import weights
from alpaca.serving.request import Job, Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

SLOTS = 64
AHEAD = 2  # times the slots: submitted, so that a free slot never waits for this thread


class Offline:
    """Answers of a folder's model; it is loaded when the first answer is asked for."""

    def __init__(self, folder: Path, tasks: Sequence[Task], max_new_tokens: int) -> None:
        """Check the folder; `tasks` is the whole suite, which sets the length of the slots."""
        if not folder.is_dir():
            raise UserError(
                f"--model {folder} is neither a folder nor a URL.",
                "Name a model folder, or an endpoint such as http://localhost:8000/v1.",
            )
        self.folder = folder.resolve()
        self._weights = weights.of(self.folder, "--model", os.environ, Path.cwd())
        check_folder(self._weights.folder)
        self.name = self.folder.name
        self.identity = identity(self._weights)
        self._tasks, self._most = tasks, max_new_tokens

    def answer(
        self, tasks: Sequence[Task], settings: dict[str, Any], *, answered: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield the journal's entry of each task as it is finished, in any order."""
        if tasks:
            with self.loaded(settings) as queue:
                yield from queue.answers(tasks)

    @contextmanager
    def loaded(self, settings: dict[str, Any]) -> "Iterator[Queue]":
        """Load the model, with slots as long as the suite needs."""
        from alpaca.folder import load_tokenizer
        from alpaca.serving import loading

        suite = encoded(Codec(load_tokenizer(self._weights.folder)), self._tasks)
        longest = max(len(one.whole or one.prompt) for one in suite)
        environment = {
            **os.environ,
            "ALPACA_SLOTS": os.environ.get("ALPACA_SLOTS", str(SLOTS)),
            "ALPACA_CONTEXT": str(longest + self._most),
            "ALPACA_MAX_SECONDS": str(10**9),
        }
        engine, _ = loading.load(self._weights, environment)
        try:
            yield Queue(engine, suite, settings)
        finally:
            engine.stop()


def identity(found: Weights) -> str:
    """One hash of what answers: of the weights and, if it is an adapter, of its files."""
    base = passport.fingerprint(found.folder)
    if not found.default:
        return base
    folder = found.adapters[found.default]
    own = passport.hash_files([folder / name for name in (stored.ADAPTER, stored.ADAPTER_WEIGHTS)])
    return passport.text_sha256(" ".join([base, *own]))


@dataclass(frozen=True)
class Asked:
    """A task as token ids: its prompt; and, as training has them, prompt, reference and end."""

    task: Task
    place: int
    prompt: tuple[int, ...]
    whole: tuple[int, ...] | None


def encoded(codec: Codec, tasks: Sequence[Task]) -> list[Asked]:
    """A suite's token ids."""
    records = [
        Record(instruction=task.instruction, input=task.input, output=task.reference or "")
        for task in tasks
    ]
    examples = codec.examples(records, 1 << 40)
    return [
        Asked(
            task,
            place,
            tuple(example.ids[: example.prompt_length]),
            None if task.reference is None else tuple(example.ids),
        )
        for place, (task, example) in enumerate(zip(tasks, examples, strict=True))
    ]


class Queue:
    """Keeps the engine's slots full."""

    def __init__(self, engine: Any, suite: Sequence[Asked], settings: dict[str, Any]) -> None:
        """Of a running engine; a task's place in the suite sets its seed."""
        self._engine, self._settings = engine, settings
        self._suite = {one.task.key: one for one in suite}
        self._done: SimpleQueue[int] = SimpleQueue()
        self._running: dict[int, tuple[Asked, Job, Job | None]] = {}

    def answers(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """Yield the entries of some of the suite's tasks as they are finished."""
        most = AHEAD * self._engine.capacity.slots
        for task in tasks:
            # a task is two requests, and the engine refuses more than its queue holds
            while self._running and (
                len(self._running) >= most or self._engine.waiting + 2 > self._engine.limits.waiting
            ):
                yield from self._finished()
            try:
                self._submit(self._suite[task.key])
            except UserError as error:  # its prompt is longer than the model's context
                refused = f"refused: {error.happened}"
                yield {"entry": "answer", "key": task.key, "output": "", "finish_reason": refused}
        while self._running:
            yield from self._finished()

    def _submit(self, one: Asked) -> None:
        def changed() -> None:
            self._done.put(one.place)

        sampling = Sampling(
            temperature=self._settings["temperature"],
            top_p=self._settings["top_p"],
            seed=seed_of(self._settings["seed"], one.place),
        )
        room = len(one.prompt) + self._settings["max_new_tokens"]
        job = self._engine.submit(
            Request(one.prompt, total_tokens=room, sampling=sampling), changed
        )
        self._running[one.place] = one, job, self._score(one.whole, changed)

    def _score(self, ids: tuple[int, ...] | None, changed: Callable[[], None]) -> Job | None:
        if ids is None or len(ids) >= self._engine.capacity.length:
            return None
        # the log probabilities of a prompt come with its first token, which is dropped
        asked = Request(ids, total_tokens=len(ids) + 1, max_new_tokens=1, prompt_logprobs=True)
        return self._engine.submit(asked, changed)  # type: ignore[no-any-return]

    def _finished(self) -> Iterator[dict[str, Any]]:
        place = self._done.get()
        if place not in self._running:
            return
        one, job, scored = self._running[place]
        parts = [part for part in (job, scored) if part is not None]
        if not all(part.completions[0].result.done() for part in parts):
            return
        del self._running[place]
        answer = job.completions[0].result.result()
        entry = {
            "entry": "answer",
            "key": one.task.key,
            "output": answer.text,
            "tokens": answer.tokens,
            "finish_reason": "stop" if answer.reason == "eos" else "length",
            "reference": one.task.scored,
        }
        if scored is not None:
            scored.completions[0].result.result()  # raises what ended it
            losses = [-each.logprob for each in scored.prompt_scored[len(one.prompt) - 1 :]]
            entry |= {"reference_loss": math.fsum(losses), "reference_tokens": len(losses)}
        yield entry
