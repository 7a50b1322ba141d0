"""Decoding with CUDA graphs: a step is recorded once for each size and then replayed.

Launching the thousand kernels of a small decode step one by one takes longer than reading the
weights, which would otherwise set its speed. Sizes are rounded up (rows to a power of two, tokens
to one of a few lengths), so there are few recordings. Rows without a sequence write to the cache's
spare slot. Prompts are computed without graphs, and so is a pass with rows of adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from alpaca.serving.attention import Step
from alpaca.serving.cache import SlotCache
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.transfer import send

SHORTEST = 256  # tokens: the shortest length recorded; each further one is double the one before


@dataclass
class Recording:
    """A step that can be replayed, and the tensors it reads and writes, kept alive with it."""

    replay: Callable[[], object]
    logits: torch.Tensor  # (rows, vocabulary)
    inputs: torch.Tensor  # (3, rows): tokens, positions, slots
    wanted: torch.Tensor  # (rows,)


class GraphModel(SlotModel):
    """A `SlotModel` on one GPU that replays its decode steps."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """As `SlotModel`; a size is recorded when it first occurs."""
        super().__init__(model, dtype)
        self._recordings: dict[tuple[int, int], Recording] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One pass: decoding tokens by replay, prompt chunks directly."""
        if batch.adapted:  # a recording has the kernels of the base alone
            return super().run(batch)
        parts = []
        decoding = len(batch.decoding)
        if decoding:
            parts.append(self._replay(batch))
        if batch.chunks:
            wanted = [index - decoding for index in batch.wanted if index >= decoding]
            prefilled = super().run(Batch([], batch.chunks, wanted or [0]))
            parts += [prefilled] if wanted or not decoding else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, batch: Batch) -> torch.Tensor:
        """Logits of the decoding rows, (decoding, vocabulary)."""
        own = [slot for slot, _, _ in batch.decoding]
        longest = max(position for _, position, _ in batch.decoding) + 1
        rows, length = sizes(max(own) + 1, longest, self.cache)
        recording = self._recordings.get((rows, length)) or self._record(rows, length)
        tokens, positions, slots = [0] * rows, [0] * rows, [self.cache.spare] * rows
        for slot, position, token in batch.decoding:
            tokens[slot], positions[slot], slots[slot] = token, position, slot
        inputs, where = send(self.device, torch.int64, [*tokens, *positions, *slots], own)
        recording.inputs.copy_(inputs.view(3, rows))
        recording.replay()
        return recording.logits[where]

    def _record(self, rows: int, length: int) -> Recording:
        """Record a step of this size; without inputs it writes to the spare slot."""
        inputs = torch.zeros(3, rows, dtype=torch.int64, device=self.device)
        inputs[2] = self.cache.spare
        tokens, positions, slots = inputs
        wanted = torch.arange(rows, device=self.device)

        def step() -> torch.Tensor:
            fixed = Step(
                self.cache, slots, positions, list(range(rows)), [length] * rows, recorded=True
            )
            return self._pass(tokens[None], positions[None], fixed, wanted)

        recording = Recording(*self._capture(step), inputs, wanted)
        self._recordings[rows, length] = recording
        return recording

    def _capture(
        self, step: Callable[[], torch.Tensor]
    ) -> tuple[Callable[[], object], torch.Tensor]:
        """Capture `step` after the warm-up that CUDA graphs need; returns replay and result."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as engines may be two
            logits = step()
        return graph.replay, logits


def sizes(rows: int, length: int, cache: SlotCache) -> tuple[int, int]:
    """Round up to a recorded size: a power of two rows, one of a few lengths; at most the cache."""
    wide = 1 << (rows - 1).bit_length()
    long = SHORTEST
    while long < length:
        long *= 2
    return min(wide, cache.capacity.slots), min(long, cache.capacity.length)
