"""Who is in which slot, and what the next pass computes.

A job takes its n slots together, first come first served. Its prompt is computed in the first of
them, chunk by chunk; then the slot's content is copied to the others and all of them decode.
"""

from collections import deque
from collections.abc import Sequence

import torch

from alpaca.serving.attention import PrefillChunk
from alpaca.serving.cache import SlotCache
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.generation import Generation
from alpaca.serving.request import Job

MIN_CHUNK = 16  # tokens: a smaller chunk of a prompt is not worth a call of attention
MIN_PREFIX = 8  # tokens: a shorter common beginning is not worth its bookkeeping


class Prompt:
    """A prompt being computed, and the sequences that wait for it; the first one's slot is used."""

    def __init__(self, sequences: list[Generation], done: int) -> None:
        """`done` tokens of the prompt are in the slot already."""
        self.sequences = sequences
        self.done = done
        self.chunk_end = done

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.sequences[0].prompt

    @property
    def left(self) -> int:
        """Tokens still to compute."""
        return len(self.ids) - self.done


class Scheduler:
    """Belongs to the engine's thread, but for the two counts `waiting` and `free_slots`."""

    def __init__(self, cache: SlotCache, prefill_tokens: int) -> None:
        """`prefill_tokens` of prompts go into one pass."""
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._free = list(range(cache.capacity.slots))
        self._queue: deque[Job] = deque()
        self._prompts: list[Prompt] = []
        self._decoding: list[Generation] = []
        self._passing: list[Prompt] = []  # those with a chunk in the present pass
        self._suspects: list[Prompt] = []  # one of them made a pass fail
        self._prefixes: list[tuple[tuple[int, ...], list[torch.Tensor]]] = []

    @property
    def waiting(self) -> int:
        """Jobs without slots."""
        return len(self._queue)

    @property
    def free_slots(self) -> int:
        """Slots without a sequence."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue or self._prompts or self._decoding)

    def remember(self, model: SlotModel, prefix: tuple[int, ...]) -> None:
        """Compute the keys of a common beginning once; prompts that begin so start with a copy."""
        if not MIN_PREFIX <= len(prefix) < self._cache.capacity.length:
            return
        chunk = PrefillChunk(self._cache.spare, 0, len(prefix))
        model.run(Batch([], [(chunk, prefix)], [0]))
        self._prefixes.append((prefix, self._cache.read(self._cache.spare, len(prefix))))
        self._prefixes.sort(key=lambda entry: len(entry[0]), reverse=True)

    def add(self, job: Job) -> None:
        """Queue a job for slots."""
        self._queue.append(job)

    def admit(self, table: Sequence[bytes]) -> list[Generation]:
        """Give slots to jobs in order of arrival while there are enough; returns who got one."""
        admitted = []
        while self._queue and len(self._free) >= self._queue[0].request.n:
            job = self._queue.popleft()
            room = self._cache.capacity.length
            slots = sorted(self._free)[: job.request.n]
            try:
                sequences = [Generation(job, *at, table, room) for at in enumerate(slots)]
                fits = sequences[0].wants_tokens
                prompt = Prompt(sequences, self._reuse(sequences[0]) if fits else 0)
            except Exception as error:  # a request that cannot even begin fails alone
                job.finish(error)
                continue
            if not fits:
                for one in sequences:
                    one.end()
                    one.finish()
                continue
            self._free = [s for s in self._free if s not in {one.slot for one in sequences}]
            self._prompts.append(prompt)
            admitted += sequences
        return admitted

    def _reuse(self, one: Generation) -> int:
        """Put the longest remembered beginning of a prompt into its slot; returns its length."""
        for prefix, saved in self._prefixes:
            # At least one token is left to compute: its logits give the answer's first token.
            if len(prefix) < len(one.prompt) and one.prompt[: len(prefix)] == prefix:
                self._cache.restore(one.slot, saved)
                return len(prefix)
        return 0

    def batch(self) -> tuple[Batch | None, list[tuple[int, Generation]]]:
        """What to compute now, and which sequences get a token from which of its logits."""
        decoding = [(one.slot, one.length, one.token) for one in self._decoding]
        chunks, offset = [], len(decoding)
        wanted = list(range(offset))
        answering = list(enumerate(self._decoding))
        divided = self._divide()
        self._passing = [prompt for prompt, _ in divided]
        for prompt, count in divided:
            chunk = PrefillChunk(prompt.sequences[0].slot, prompt.done, prompt.done + count)
            prompt.chunk_end = chunk.last
            chunks.append((chunk, prompt.ids[chunk.first : chunk.last]))
            offset += count
            if count == prompt.left:
                answering += [(len(wanted), one) for one in prompt.sequences]
                wanted.append(offset - 1)
        if not decoding and not chunks:
            return None, []
        return Batch(decoding, chunks, wanted or [0]), answering

    def _divide(self) -> list[tuple[Prompt, int]]:
        """Divide a pass's prompt tokens in order of arrival.

        A prompt that fits goes in whole. One that does not takes half of what is left, so that
        those behind it move too, and nothing if that half is less than a chunk is worth.
        """
        divided: list[tuple[Prompt, int]] = []
        left = self._prefill_tokens
        waiting = self._suspects[:1] or self._prompts
        for prompt in waiting:
            count = prompt.left
            if count > left:
                count = left if prompt is waiting[-1] else (left + 1) // 2
                if divided and count < MIN_CHUNK:
                    continue
            divided.append((prompt, count))
            left -= count
        return divided

    def advance(self) -> None:
        """After a pass: its keys are in the slots; prompts that are complete begin to decode."""
        for one in self._decoding:
            one.length += 1
        for prompt in self._passing:
            prompt.done = prompt.chunk_end
            if prompt in self._suspects:
                self._suspects.remove(prompt)
            if prompt.left:
                continue
            self._prompts.remove(prompt)
            first, *others = prompt.sequences
            for one in others:
                self._cache.copy(first.slot, one.slot, prompt.done)
            for one in prompt.sequences:
                one.length = prompt.done
            self._decoding = sorted([*self._decoding, *prompt.sequences], key=lambda s: s.slot)
        self._passing = []

    def release(self, one: Generation) -> None:
        """Free the slot of a sequence that ended, then tell who waits for it."""
        self._decoding.remove(one)
        self._free.append(one.slot)
        one.finish()

    def drop_canceled(self) -> list[Job]:
        """Remove cancelled jobs wherever they are; their slots are free at once."""
        dropped = {id(job): job for job in self._queue if job.canceled}
        self._queue = deque(job for job in self._queue if not job.canceled)
        for one in [*self._decoding, *(s for p in self._prompts for s in p.sequences)]:
            if one.job.canceled:
                dropped[id(one.job)] = one.job
                self._free.append(one.slot)
        self._decoding = [one for one in self._decoding if not one.job.canceled]
        self._prompts = [p for p in self._prompts if not p.sequences[0].job.canceled]
        self._suspects = [p for p in self._suspects if p in self._prompts]
        return list(dropped.values())

    def fail_pass(self, error: BaseException) -> None:
        """A pass raised `error`: end the prompt that was new in it, or else all that decode.

        Where several were new, each is tried again alone. Nothing has advanced, so those that
        remain repeat the pass.
        """
        new, self._passing = self._passing, []
        if len(new) > 1:
            self._suspects = new
            return
        culprits = [s for p in new for s in p.sequences] or self._decoding
        if not new:
            self._decoding = []
        self._prompts = [p for p in self._prompts if p not in new]
        self._suspects = [p for p in self._suspects if p not in new]
        self._free += [one.slot for one in culprits]
        for one in culprits:
            one.fail(error)
            one.finish()

    def clear(self) -> list[Job]:
        """Take everything out; returns the jobs that were unfinished."""
        active = [*self._decoding, *(s for p in self._prompts for s in p.sequences)]
        jobs = {id(one.job): one.job for one in active} | {id(job): job for job in self._queue}
        self._free = list(range(self._cache.capacity.slots))
        self._queue, self._decoding, self._prompts = deque(), [], []
        self._passing, self._suspects = [], []
        return list(jobs.values())
