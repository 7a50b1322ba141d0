"""Decoding under CUDA graphs: a step is recorded once for each size and then replayed.

A decode step of a small batch is bound by reading the weights, and launching its thousand kernels
one by one takes longer than that. Sizes are rounded up (rows to a power of two, tokens to one of
a few lengths), so there are few recordings; rows without a sequence write to the cache's spare
slot. Prompts are computed outside of the graphs.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from alpaca.serving.attention import Step
from alpaca.serving.cache import SlotCache
from alpaca.serving.forward import Batch, SlotModel

SHORTEST = 256  # tokens: the shortest length recorded; others are doubles of it


@dataclass
class Recording:
    """A graph, and the tensors it reads and writes, which must live as long as it."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # (1, rows)
    positions: torch.Tensor  # (rows,)
    slots: torch.Tensor  # (rows,)
    wanted: torch.Tensor  # (rows,)
    logits: torch.Tensor  # (rows, vocabulary)


class GraphModel(SlotModel):
    """A `SlotModel` on one GPU that replays its decode steps."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """As `SlotModel`; recordings are made as sizes come up."""
        super().__init__(model, dtype)
        self._recordings: dict[tuple[int, int], Recording] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One pass: what decodes by replay, pieces of prompts directly."""
        parts = []
        decoding = len(batch.decoding)
        if decoding:
            parts.append(self._replay(batch))
        if batch.pieces:
            wanted = [index - decoding for index in batch.wanted if index >= decoding]
            fresh = super().run(Batch([], batch.pieces, wanted or [0]))
            parts += [fresh] if wanted or not decoding else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, batch: Batch) -> torch.Tensor:
        """Logits of the decoding rows, (decoding, vocabulary)."""
        slots, positions, tokens = (list(column) for column in zip(*batch.decoding, strict=True))
        rows, length = sizes(max(slots) + 1, max(positions) + 1, self.cache)
        recording = self._recordings.get((rows, length)) or self._record(rows, length)
        inputs = torch.zeros(3, rows, dtype=torch.long)
        inputs[2] = self.cache.spare
        inputs[:, slots] = torch.tensor([tokens, positions, slots])
        on_device = inputs.to(self.device, non_blocking=True)
        recording.tokens.copy_(on_device[:1])
        recording.positions.copy_(on_device[1])
        recording.slots.copy_(on_device[2])
        recording.graph.replay()
        return recording.logits[slots]

    def _record(self, rows: int, length: int) -> Recording:
        """Run a step of this size a few times on the side, as graphs demand, and record it."""
        tokens = torch.zeros(1, rows, dtype=torch.long, device=self.device)
        positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        slots = torch.full((rows,), self.cache.spare, device=self.device)
        wanted = torch.arange(rows, device=self.device)

        def step() -> torch.Tensor:
            fixed = Step(
                self.cache, slots, positions, list(range(rows)), [length] * rows, recorded=True
            )
            return self._pass(tokens, positions[None], fixed, wanted)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        made = Recording(graph, tokens, positions, slots, wanted, logits)
        self._recordings[rows, length] = made
        return made


def sizes(rows: int, length: int, cache: SlotCache) -> tuple[int, int]:
    """Round up to what is recorded: a power of two rows, a few lengths; never beyond the cache."""
    wide = 1 << (rows - 1).bit_length()
    long = SHORTEST
    while long < length:
        long *= 2
    return min(wide, cache.capacity.slots), min(long, cache.capacity.length)
