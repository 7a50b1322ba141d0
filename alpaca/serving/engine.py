"""Continuous batching: one thread owns the model; requests join and leave at every step.

A step is one forward pass over the next token of every decoding sequence and over bounded chunks of
waiting prompts, so a long prompt slows the others a little but never stalls them. The n completions
of a request share the pass over its prompt. All public methods are thread-safe.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from alpaca.serving import border
from alpaca.serving.adapters import Adapters, opened
from alpaca.serving.border import EngineStoppedError, Limits
from alpaca.serving.forward import SlotModel
from alpaca.serving.generation import Generation
from alpaca.serving.lora import LoadedAdapter
from alpaca.serving.measures import Measures
from alpaca.serving.request import CanceledError, Job, Request, Scored
from alpaca.serving.sampling import NO_TOKEN, Draws, choose, mark, score
from alpaca.serving.scheduler import Scheduler
from alpaca.serving.transfer import send
from alpaca.tokens import Codec


class Engine:
    """Serves a `SlotModel` whose cache is allocated."""

    def __init__(
        self,
        model: SlotModel,
        table: Sequence[bytes],
        ends: frozenset[int],
        limits: Limits | None = None,
        adapters: Adapters[LoadedAdapter] | None = None,
    ) -> None:
        """`table` gives each token's bytes (`stream.token_bytes`), `ends` the ids that end text."""
        self.model = model
        self.adapters: Adapters[LoadedAdapter] = adapters or Adapters()
        self.table: Sequence[bytes] = [*table, *[b""] * (model.vocabulary - len(table))]
        self.ends = ends
        self.limits = limits or Limits()
        self.capacity = model.cache.capacity
        self._scheduler = Scheduler(model.cache, self.limits.prefill_tokens, self.limits.seconds)
        self._seen = torch.zeros(
            self.capacity.slots, model.vocabulary, dtype=torch.bool, device=model.device
        )
        self._counts: torch.Tensor | None = None  # as `_seen`, made when a request needs it
        self.measures = Measures()
        self._inbox: deque[Job] = deque()
        self._arrivals: deque[tuple[LoadedAdapter, Future[None]]] = deque()
        self._shared: list[tuple[int, ...]] = []  # prefixes of the templates
        self._wake = threading.Condition()
        self._stopping = False
        self._step_began: float | None = None
        self._failures = 0  # failed steps in a row
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self, shared_prefixes: Sequence[Sequence[int]] = ()) -> None:
        """Compute the prefixes that many prompts share, once, and start serving."""
        self._shared = [tuple(prefix) for prefix in shared_prefixes]
        for adapter in (None, *self.adapters.loaded):
            self._remember(adapter)
        self._thread.start()

    def load_adapter(self, name: str, folder: Path, codec: Codec) -> None:
        """Serve one more adapter. It replaces one of the same name: running requests keep theirs.

        Its folder is read in a thread that ends, for the reason that `loading.load` gives. Then the
        engine's thread computes the shared prefixes with it, between two steps.

        Raises:
            UserError: as `adapters.opened`.
            EngineStoppedError: the engine has stopped.
        """
        shared = sum(map(len, self._shared))
        with ThreadPoolExecutor(max_workers=1) as own_thread:
            asked = name, folder, self.adapters, self.model, codec, shared
            adapter = own_thread.submit(opened, *asked).result()
        done: Future[None] = Future()
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineStoppedError("The engine is not running.")
            self._arrivals.append((adapter, done))
            self._wake.notify()
        done.result()

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away; as `Adapters.remove`."""
        self.adapters.remove(name)

    def submit(self, request: Request, notify: Callable[[], None] | None = None) -> Job:
        """Queue a request. The engine's thread calls `notify` when a completion has changed.

        Raises:
            UserError: as `border.check`; or no adapter has the name asked for.
            BusyError: the queue is full.
            EngineStoppedError: the engine has stopped.
        """
        border.check(request, self.capacity, self.model.vocabulary)
        job = Job(request, notify, self.measures.end, self.adapters.find(request.adapter))
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineStoppedError("The engine is not running.")
            if self.waiting >= self.limits.waiting:
                raise border.busy(self.limits.waiting)
            self._inbox.append(job)
            self._wake.notify()
        return job

    def check_text(self, size: int) -> None:
        """Raise UserError for a prompt of `size` bytes that cannot fit into a slot."""
        border.check_text(size, self.capacity.length, self.table)

    def stop(self) -> None:
        """End the thread; unfinished requests fail with EngineStoppedError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the thread is alive, not stuck in a step, and not failing step after step."""
        began = self._step_began
        stuck = began is not None and time.monotonic() - began > self.limits.stuck_seconds
        failing = self._failures >= self.limits.failures
        alive = self._thread.is_alive() and not self._stopping
        return alive and not stuck and not failing

    @property
    def waiting(self) -> int:
        """Number of requests that wait for slots."""
        return len(self._inbox) + self._scheduler.waiting

    @property
    def idle_slots(self) -> int:
        """Number of free slots; all of them when nothing is being served."""
        return self._scheduler.free_slots

    def _loop(self) -> None:
        """The engine's thread: run steps while there is work, wait while there is none."""
        try:
            while self._collect():
                self._step_began = time.monotonic()
                try:
                    self._adopt()
                    self._step()
                except Exception as error:  # any error ends requests, not the server
                    self._failures += 1
                    self._scheduler.fail_pass(error)
                self._step_began = None
        finally:  # even if `fail_pass` raised: no caller may wait for a thread that has ended
            with self._wake:
                self._stopping = True
            for job in [*self._inbox, *self._scheduler.clear()]:
                job.finish(EngineStoppedError("The engine was stopped."))
            for _, done in self._arrivals:
                done.set_exception(EngineStoppedError("The engine was stopped."))

    def _collect(self) -> bool:
        """Queue new requests; wait if there is nothing to do. False when stopping."""
        with self._wake:
            work = self._inbox, self._arrivals
            while not (any(work) or self._scheduler.busy or self._stopping):
                self._wake.wait()
            while self._inbox:
                job = self._inbox.popleft()
                self.measures.requests += 1
                self.measures.prompt_tokens += len(job.request.prompt)
                if job.adapter is not None:
                    job.adapter.requests += 1
                self._scheduler.add(job)
            return not self._stopping

    def _adopt(self) -> None:
        """Take in the adapters that have been loaded since the last step."""
        while self._arrivals:
            adapter, done = self._arrivals.popleft()
            try:
                self._remember(adapter)
                self.adapters.put(adapter)
            except Exception as error:  # of this adapter, which is not served then
                done.set_exception(error)
            else:
                done.set_result(None)

    def _remember(self, adapter: LoadedAdapter | None) -> None:
        for prefix in self._shared:
            self._scheduler.remember(self.model, prefix, adapter)

    def _step(self) -> None:
        """Drop cancelled jobs, admit new ones, run one pass, sample, deliver the text."""
        for job in self._scheduler.drop_canceled():
            job.finish(CanceledError())
        for sequence in self._scheduler.admit(self.table):
            try:
                self._begin(sequence)
            except Exception as error:  # its job fails alone, and leaves with the next step
                sequence.job.finish(error)
                sequence.job.cancel()
        batch, sampled = self._scheduler.batch()
        if batch is None:
            return
        rows = [row for row, _ in sampled]
        sequences = [sequence for _, sequence in sampled]
        draws = self._draws(sequences)
        # n completions of a prompt use the same row; rows of scored prompts are not sampled from
        chosen = bool(rows) and rows != list(range(len(batch.wanted)))
        where = send(self.model.device, torch.int64, rows) if chosen else ()
        logits = self.model.run(batch)
        found = self._score_prompts(logits)
        tokens, scored = logits[:0, 0], list[Scored | None]()
        if sequences:
            logits = logits[where] if chosen else logits
            tokens = choose(logits, draws, self._seen, self._counts)
            scored = self._score(logits, tokens, sequences)
        self._scheduler.advance()
        if sequences:
            mark(tokens, draws, self._seen, self._counts)
        for job, scores in found:
            job.prompt_scored += scores
        # The only point of a step that waits for the GPU.
        self._accept(sequences, tokens.tolist(), scored)
        self._failures = 0

    def _score_prompts(self, logits: torch.Tensor) -> list[tuple[Job, list[Scored]]]:
        """The log probabilities of the prompt tokens that follow those of this pass."""
        found = []
        for prompt in self._scheduler.scored():
            first = prompt.done + 1
            ids = torch.tensor(prompt.ids[first : first + len(prompt.rows)], device=logits.device)
            rows = logits[prompt.rows.start : prompt.rows.stop]
            counts = [prompt.job.request.logprobs or 0] * len(ids)
            found.append((prompt.job, score(rows, ids, counts)))
        return found

    def _score(
        self, logits: torch.Tensor, tokens: torch.Tensor, sequences: list[Generation]
    ) -> list[Scored | None]:
        """The log probabilities of the sequences that ask for them."""
        scored: list[Scored | None] = [None] * len(sequences)
        asked = [(row, s.logprobs) for row, s in enumerate(sequences) if s.logprobs is not None]
        if asked:
            rows = [row for row, _ in asked]
            found = score(logits[rows], tokens[rows], [count for _, count in asked])
            for row, one in zip(rows, found, strict=True):
                scored[row] = one
        return scored

    def _draws(self, sequences: list[Generation]) -> Draws:
        """The sampling settings and random numbers of these sequences."""
        return Draws(
            [s.sampling for s in sequences],
            [s.uniform for s in sequences],
            self.model.vocabulary,
            self.model.device,
            [s.slot for s in sequences],
        )

    def _begin(self, sequence: Generation) -> None:
        """Mark the prompt's tokens as seen, for the repetition penalty."""
        if sequence.sampling.repetition_penalty != 1:
            self._seen[sequence.slot] = False
            self._seen[sequence.slot, list(sequence.prompt)] = True
        if sequence.sampling.frequency_penalty or sequence.sampling.presence_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(self._seen, dtype=torch.int32)
            self._counts[sequence.slot] = 0

    def _accept(
        self, sequences: list[Generation], tokens: list[int], scored: list[Scored | None]
    ) -> None:
        """Give each sequence its token, and free the slots of those that are finished."""
        now, measures = time.monotonic(), self.measures
        for sequence, token, one in zip(sequences, tokens, scored, strict=True):
            times = measures.first_token if sequence.is_first else measures.between_tokens
            times.add(now - sequence.last_token)
            sequence.last_token = now
            measures.generated_tokens += 1
            try:
                if token == NO_TOKEN:
                    raise ArithmeticError("The model's logits for this request are not numbers.")
                sequence.accept(token, self.ends, one)
            except Exception as error:  # a request that fails here fails alone
                sequence.fail(error)
            if sequence.reason:
                self._scheduler.release(sequence)
