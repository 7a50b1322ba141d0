"""Continuous batching: one thread owns the model, requests join and leave at every step.

A step is one pass that carries the next token of every decoding sequence and bounded chunks of
waiting prompts, so a long prompt costs the others a little per step and never a stall. The pass
over a prompt is shared by its n completions. Everything public is thread-safe.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alpaca.errors import UserError
from alpaca.serving.forward import SlotModel
from alpaca.serving.generation import Generation
from alpaca.serving.request import CanceledError, Job, Request
from alpaca.serving.sampling import NO_TOKEN, Draws, choose
from alpaca.serving.scheduler import Scheduler
from alpaca.serving.transfer import send

SHRINKING = 4  # normalizing a text (Unicode's NFC, NFKC) leaves at least a quarter of its bytes
STOPS = 16  # each is looked for at every token, on the thread that serves everyone
STOP_LENGTH = 1000  # characters


class EngineStoppedError(RuntimeError):
    """The engine has been stopped, or its thread has died."""


class BusyError(RuntimeError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True)
class Limits:
    """How much is waited for and done at a time.

    `waiting` requests may queue for a slot. `prefill_tokens` of prompts are computed in one step.
    A step of more than `stuck_seconds` counts as illness, and so do `failures` steps in a row.
    """

    waiting: int = 256
    prefill_tokens: int = 128
    stuck_seconds: float = 60.0
    failures: int = 5


class Engine:
    """Serves a `SlotModel` whose cache is allocated."""

    def __init__(
        self,
        model: SlotModel,
        table: Sequence[bytes],
        ends: frozenset[int],
        limits: Limits | None = None,
    ) -> None:
        """`table` gives each token's bytes (`stream.token_bytes`), `ends` the ids that end text."""
        self.model = model
        self.table = [*table, *[b""] * (model.vocabulary - len(table))]
        self.ends = ends
        self.limits = limits or Limits()
        self.capacity = model.cache.capacity
        self._most_text = SHRINKING * self.capacity.length * max(map(len, self.table))
        self._scheduler = Scheduler(model.cache, self.limits.prefill_tokens)
        self._seen = torch.zeros(
            self.capacity.slots, model.vocabulary, dtype=torch.bool, device=model.device
        )
        self._inbox: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._step_began: float | None = None
        self._failures = 0  # steps in a row
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self, shared_prefixes: Sequence[Sequence[int]] = ()) -> None:
        """Compute the prefixes that many prompts begin with, once, and start serving."""
        for prefix in shared_prefixes:
            self._scheduler.remember(self.model, tuple(prefix))
        self._thread.start()

    def submit(self, request: Request) -> Job:
        """Queue a request.

        Raises:
            UserError: the prompt is empty, too long, or of tokens that do not exist; n is larger
                than the slots; or there are too many or too long stop strings.
            BusyError: too many requests wait already.
            EngineStoppedError: it no longer serves.
        """
        self._check(request)
        job = Job(request)
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineStoppedError("The engine does not run.")
            if len(self._inbox) + self._scheduler.waiting >= self.limits.waiting:
                raise BusyError(f"{self.limits.waiting} requests wait already; try again later.")
            self._inbox.append(job)
            self._wake.notify()
        return job

    def check_text(self, size: int) -> None:
        """Raise UserError for a prompt of so many bytes that no tokens of it fit into a slot.

        Each token stands for the longest one's bytes at most, so this refuses no prompt that
        `submit` would take, and costs nothing.
        """
        if size > self._most_text:
            raise UserError(
                f"The prompt has {size:,} bytes; what has more than {self._most_text:,} cannot fit "
                f"into {self.capacity.length} tokens.",
                "Shorten it.",
            )

    def stop(self) -> None:
        """End the thread; what is unfinished fails with EngineStoppedError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the thread lives, is not stuck in a step, and its passes do not all fail."""
        began = self._step_began
        stuck = began is not None and time.monotonic() - began > self.limits.stuck_seconds
        failing = self._failures >= self.limits.failures
        alive = self._thread.is_alive() and not self._stopping
        return alive and not stuck and not failing

    @property
    def idle_slots(self) -> int:
        """Slots that no sequence holds; all of them when nothing is being served."""
        return self._scheduler.free_slots

    def _check(self, request: Request) -> None:
        if request.n > self.capacity.slots:
            raise UserError(f"n={request.n}, but the engine has {self.capacity.slots} slots.")
        if len(request.stop) > STOPS or any(len(text) > STOP_LENGTH for text in request.stop):
            raise UserError(
                f"stop may name {STOPS} texts, each of at most {STOP_LENGTH} characters.",
                "Name fewer, or only how they begin.",
            )
        if len(request.prompt) >= self.capacity.length:
            raise UserError(
                f"The prompt has {len(request.prompt)} tokens; prompt and answer together may "
                f"have {self.capacity.length}.",
                "Shorten it.",
            )
        known = range(self.model.vocabulary)
        if not request.prompt or not all(token in known for token in request.prompt):
            raise UserError(
                f"A prompt is one or more tokens from 0 to {known[-1]}.",
                "Encode it with the model's own tokenizer.",
            )

    def _loop(self) -> None:
        """The thread: steps while there is work, waits while there is none."""
        try:
            while self._collect():
                self._step_began = time.monotonic()
                try:
                    self._step()
                except Exception as error:  # whatever it is, it ends requests and not the server
                    self._failures += 1
                    self._scheduler.fail_pass(error)
                self._step_began = None
        finally:  # also when blaming failed: nobody may wait for a thread that has ended
            with self._wake:
                self._stopping = True
            for job in [*self._inbox, *self._scheduler.clear()]:
                job.finish(EngineStoppedError("The engine was stopped."))

    def _collect(self) -> bool:
        """Take in new requests, waiting for one if there is nothing to do; False at the end."""
        with self._wake:
            while not (self._inbox or self._scheduler.busy or self._stopping):
                self._wake.wait()
            while self._inbox:
                self._scheduler.add(self._inbox.popleft())
            return not self._stopping

    def _step(self) -> None:
        """Drop what was cancelled, admit, run one pass, sample, hand out text."""
        for job in self._scheduler.drop_canceled():
            job.finish(CanceledError())
        for one in self._scheduler.admit(self.table):
            self._begin(one)
        batch, answering = self._scheduler.batch()
        if batch is None:
            return
        rows, sequences = [row for row, _ in answering], [one for _, one in answering]
        draws = self._draws(sequences)
        shared = len(set(rows)) < len(rows)  # completions that share a prompt share its row
        where = send(self.model.device, torch.int64, rows) if shared else ()
        logits = self.model.run(batch)
        self._scheduler.advance()
        if sequences:
            tokens = choose(logits[where] if shared else logits, draws, self._seen)
            # The one point of a step where a GPU is waited for.
            self._accept(sequences, tokens.tolist())
        self._failures = 0

    def _draws(self, sequences: list[Generation]) -> Draws:
        """How these sequences' logits become tokens."""
        return Draws(
            [one.sampling for one in sequences],
            [one.uniform for one in sequences],
            self.model.vocabulary,
            self.model.device,
            [one.slot for one in sequences],
        )

    def _begin(self, one: Generation) -> None:
        """Mark the prompt's tokens as seen, for the repetition penalty."""
        if one.sampling.repetition_penalty != 1:
            self._seen[one.slot] = False
            self._seen[one.slot, list(one.prompt)] = True

    def _accept(self, sequences: list[Generation], tokens: list[int]) -> None:
        """Hand each sequence its token, and free the slots of those that end with it."""
        for one, token in zip(sequences, tokens, strict=True):
            try:
                if token == NO_TOKEN:
                    self.model.cache.erase(one.slot, one.length)  # for the next in it
                    raise ArithmeticError("The model's logits for this request are not numbers.")
                one.accept(token, self.ends)
            except Exception as error:  # a request that fails here fails alone
                one.fail(error)
            if one.reason:
                self._scheduler.release(one)
