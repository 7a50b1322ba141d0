"""Assigns slots to jobs, and decides what the next pass computes.

A job gets its n slots together, in order of arrival. Its prompt is computed chunk by chunk in the
first slot. The content of that slot is then copied to the others, and all of them decode.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

from alpaca.serving.attention import PrefillChunk
from alpaca.serving.cache import SlotCache
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.generation import Generation
from alpaca.serving.lora import LoadedAdapter, Prefix
from alpaca.serving.request import Job

MIN_CHUNK = 16  # tokens: a smaller prompt chunk is not worth an attention call
MIN_PREFIX = 8  # tokens: a shorter shared prefix is not worth its bookkeeping
SCORED_CHUNK = 256  # tokens: the logits of all of them are in memory


class Prompt:
    """A prompt in progress and the sequences that wait for it; it uses the first one's slot."""

    def __init__(self, sequences: list[Generation], done: int) -> None:
        """The first `done` tokens of the prompt are already in the slot."""
        self.sequences = sequences
        self.done = done
        self.chunk_end = done
        self.rows = range(0)  # of the current pass's logits, for `scored` prompts

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.sequences[0].prompt

    @property
    def left(self) -> int:
        """Tokens still to compute."""
        return len(self.ids) - self.done

    @property
    def job(self) -> Job:
        """The request that the prompt belongs to."""
        return self.sequences[0].job

    @property
    def scored(self) -> bool:
        """Whether the log probabilities of its own tokens are asked for."""
        return self.job.request.prompt_logprobs


class Scheduler:
    """For the engine's thread only; other threads may read `waiting` and `free_slots`."""

    def __init__(self, cache: SlotCache, prefill_tokens: int, seconds: float) -> None:
        """One pass computes at most `prefill_tokens` prompt tokens; an answer takes `seconds`."""
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._seconds = seconds
        self._free = list(range(cache.capacity.slots))
        self._written = [0] * cache.capacity.slots  # tokens that passes wrote for the slot's user
        self._queue: deque[Job] = deque()
        self._prompts: list[Prompt] = []
        self._decoding: list[Generation] = []
        self._in_pass: list[Prompt] = []  # prompts with a chunk in the current pass
        self._stepping: list[Generation] = []  # decoding sequences in the current pass
        self._suspects: list[Prompt | Generation] = []  # one of which made a pass fail
        self._prefixes: list[Prefix] = []  # the base's; an adapter has its own

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for slots."""
        return len(self._queue)

    @property
    def free_slots(self) -> int:
        """Number of slots without a sequence."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether there is work for a step."""
        return bool(self._queue or self._prompts or self._decoding)

    def remember(
        self, model: SlotModel, prefix: tuple[int, ...], adapter: LoadedAdapter | None = None
    ) -> None:
        """Compute the keys of a shared prefix once; prompts that begin with it copy them.

        An adapter changes keys, so its requests copy only those computed with it.
        """
        if not MIN_PREFIX <= len(prefix) < self._cache.capacity.length:
            return
        chunk = PrefillChunk(self._cache.spare, 0, len(prefix))
        adapted = {} if adapter is None else {adapter: range(len(prefix))}
        model.run(Batch([], [(chunk, prefix)], [0], adapted))
        prefixes = self._prefixes if adapter is None else adapter.prefixes
        prefixes.append((prefix, self._cache.read(self._cache.spare, len(prefix))))
        prefixes.sort(key=lambda entry: len(entry[0]), reverse=True)

    def add(self, job: Job) -> None:
        """Queue a job for slots."""
        self._queue.append(job)

    def admit(self, table: Sequence[bytes]) -> list[Generation]:
        """Give free slots to jobs in order of arrival; returns the new sequences."""
        admitted = []
        while self._queue and len(self._free) >= self._queue[0].request.n:
            job = self._queue.popleft()
            limits = self._cache.capacity.length, self._seconds
            slots = sorted(self._free)[: job.request.n]
            try:
                sequences = [Generation(job, *at, table, *limits) for at in enumerate(slots)]
                fits = sequences[0].wants_tokens
                prompt = Prompt(sequences, self._reuse(sequences[0]) if fits else 0)
            except Exception as error:  # a request that fails here fails alone
                job.finish(error)
                continue
            if not fits:
                for sequence in sequences:
                    sequence.end()
                    sequence.finish()
                continue
            self._free = [slot for slot in self._free if slot not in slots]
            for slot in slots:
                self._written[slot] = 0
            self._prompts.append(prompt)
            admitted += sequences
        return admitted

    def _reuse(self, sequence: Generation) -> int:
        """Copy the longest remembered prefix of a prompt into its slot; returns its length."""
        if sequence.job.request.prompt_logprobs:  # needs the logits of all tokens
            return 0
        adapter = sequence.job.adapter
        for prefix, saved in self._prefixes if adapter is None else adapter.prefixes:
            # At least one token must remain: its logits give the answer's first token.
            if len(prefix) < len(sequence.prompt) and sequence.prompt[: len(prefix)] == prefix:
                self._cache.restore(sequence.slot, saved)
                return len(prefix)
        return 0

    def batch(self) -> tuple[Batch | None, list[tuple[int, Generation]]]:
        """The next pass, and for each row of its logits the sequences that sample from it.

        The rows of `scored` prompts that nothing samples from are in `Prompt.rows`.
        """
        prompts, self._stepping = self._prompts, self._decoding
        if self._suspects:  # each in a pass of its own
            one = self._suspects[0]
            prompts, self._stepping = ([one], []) if isinstance(one, Prompt) else ([], [one])
        decoding = [(s.slot, s.length, s.token) for s in self._stepping]
        adapted: defaultdict[LoadedAdapter, list[int]] = defaultdict(list)
        for row, sequence in enumerate(self._stepping):
            if sequence.job.adapter is not None:
                adapted[sequence.job.adapter].append(row)
        for slot, position, _ in decoding:
            self._written[slot] = position + 1
        chunks, offset = [], len(decoding)
        wanted = list(range(offset))
        sampled = list(enumerate(self._stepping))
        divided = self._divide(prompts)
        self._in_pass = [prompt for prompt, _ in divided]
        for prompt, count in divided:
            chunk = PrefillChunk(prompt.sequences[0].slot, prompt.done, prompt.done + count)
            prompt.chunk_end = self._written[chunk.slot] = chunk.last
            chunks.append((chunk, prompt.ids[chunk.first : chunk.last]))
            if prompt.job.adapter is not None:
                adapted[prompt.job.adapter] += range(offset, offset + count)
            ends_prompt = count == prompt.left
            if prompt.scored:
                prompt.rows = range(len(wanted), len(wanted) + count - ends_prompt)
                wanted += range(offset, offset + len(prompt.rows))
            offset += count
            if ends_prompt:
                sampled += [(len(wanted), sequence) for sequence in prompt.sequences]
                wanted.append(offset - 1)
        if not decoding and not chunks:
            return None, []
        return Batch(decoding, chunks, wanted or [0], adapted), sampled

    def scored(self) -> list[Prompt]:
        """The prompts of the current pass whose own tokens are scored."""
        return [prompt for prompt in self._in_pass if prompt.scored and prompt.rows]

    def _divide(self, waiting: list[Prompt]) -> list[tuple[Prompt, int]]:
        """Share out the prompt tokens of one pass in order of arrival.

        A prompt that fits is computed whole. One that does not fit gets half of the remaining
        tokens, so that the prompts behind it also advance; the last prompt gets all of them. Except
        for the first chunk, a chunk of fewer than MIN_CHUNK tokens is left for a later pass.
        """
        divided: list[tuple[Prompt, int]] = []
        left = self._prefill_tokens
        for prompt in waiting:
            count = min(prompt.left, SCORED_CHUNK) if prompt.scored else prompt.left
            if count > left:
                count = left if prompt is waiting[-1] else (left + 1) // 2
                if divided and count < MIN_CHUNK:
                    continue
            divided.append((prompt, count))
            left -= count
        return divided

    def advance(self) -> None:
        """Record that a pass succeeded; sequences whose prompt is complete start decoding."""
        passed = [*self._in_pass, *self._stepping]
        self._suspects = [one for one in self._suspects if one not in passed]
        for sequence in self._stepping:
            sequence.length += 1
        for prompt in self._in_pass:
            prompt.done = prompt.chunk_end
            if prompt.left:
                continue
            self._prompts.remove(prompt)
            first, *others = prompt.sequences
            for sequence in others:
                self._cache.copy(first.slot, sequence.slot, prompt.done)
                self._written[sequence.slot] = prompt.done
            for sequence in prompt.sequences:
                sequence.length = prompt.done
            self._decoding = sorted([*self._decoding, *prompt.sequences], key=lambda s: s.slot)
        self._in_pass, self._stepping = [], []

    def release(self, sequence: Generation) -> None:
        """Free the slot of a finished sequence, then deliver its outcome."""
        self._decoding.remove(sequence)
        if sequence.failed:
            self._discard(sequence)
        else:
            self._free.append(sequence.slot)
        sequence.finish()

    def _discard(self, sequence: Generation) -> None:
        """Free the slot of a failed or cancelled sequence, which may hold NaN keys."""
        self._cache.erase(sequence.slot, self._written[sequence.slot])
        self._free.append(sequence.slot)

    def drop_canceled(self) -> list[Job]:
        """Remove cancelled jobs, queued or running; their slots become free at once."""
        dropped = {id(job): job for job in self._queue if job.canceled}
        self._queue = deque(job for job in self._queue if not job.canceled)
        for sequence in [*self._decoding, *(s for p in self._prompts for s in p.sequences)]:
            if sequence.job.canceled:
                dropped[id(sequence.job)] = sequence.job
                self._discard(sequence)
        self._decoding = [s for s in self._decoding if not s.job.canceled]
        self._prompts = [p for p in self._prompts if not p.sequences[0].job.canceled]
        kept = [*self._prompts, *self._decoding]
        self._suspects = [one for one in self._suspects if one in kept]
        return list(dropped.values())

    def fail_pass(self, error: BaseException) -> None:
        """A pass raised `error`: each thing that it computed is computed again alone, or fails.

        No sequence has advanced, so a pass that is repeated draws the same tokens. An error after
        `advance` fails all that decode: their tokens are lost.
        """
        computed: list[Prompt | Generation] = [*self._in_pass, *self._stepping]
        self._in_pass, self._stepping = [], []
        if len(computed) > 1:
            print(f"serve: a pass failed; its parts are computed one by one: {error!r}", flush=True)
            self._suspects = computed
            return
        for one in computed or list(self._decoding):
            failed = one.sequences if isinstance(one, Prompt) else [one]
            self._prompts = [prompt for prompt in self._prompts if prompt is not one]
            self._decoding = [sequence for sequence in self._decoding if sequence is not one]
            self._suspects = [suspect for suspect in self._suspects if suspect is not one]
            for sequence in failed:
                self._discard(sequence)
                sequence.fail(error)
                sequence.finish()

    def clear(self) -> list[Job]:
        """Remove all jobs; returns those that were unfinished."""
        active = [*self._decoding, *(s for p in self._prompts for s in p.sequences)]
        jobs = {id(s.job): s.job for s in active} | {id(job): job for job in self._queue}
        self._free = list(range(self._cache.capacity.slots))
        self._queue, self._decoding, self._prompts = deque(), [], []
        self._in_pass, self._stepping, self._suspects = [], [], []
        return list(jobs.values())
