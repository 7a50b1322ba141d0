"""Decoding with CUDA graphs: a step is recorded once for each number of rows and then replayed.

Launching the thousand kernels of a small decode step one by one takes longer than reading the
weights, which would otherwise set its speed. Lengths are data (`attention.Ragged`), so a recording
reads what its sequences have, and there is one for each power of two of rows. All are made at
start, so none fails later, the largest first, as they share their memory. Rows without a sequence
write to the cache's spare slot. A pass with prompt chunks or adapters' rows is computed directly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from alpaca.serving.attention import Ragged, Step
from alpaca.serving.cache import Capacity, LayerShape
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.transfer import send


@dataclass
class Recording:
    """A step that can be replayed, and the tensors it reads and writes, kept alive with it."""

    replay: Callable[[], object]
    logits: torch.Tensor  # (rows, vocabulary)
    inputs: torch.Tensor  # (3, rows): tokens, positions, slots
    constant: tuple[torch.Tensor, ...]


class GraphModel(SlotModel):
    """A `SlotModel` on one GPU that replays its decode steps."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """As `SlotModel`."""
        super().__init__(model, dtype)
        self._recordings: dict[int, Recording] = {}  # by rows, descending
        self._pool: Any = None

    def allocate(self, shapes: list[LayerShape], capacity: Capacity) -> None:
        """Allocate the cache, and record the steps where FlashAttention works."""
        super().allocate(shapes, capacity)
        self._recordings = {}
        if not self.flash:
            print("serve: no FlashAttention for this GPU, type or torch: slow", flush=True)
            return
        try:
            for rows in reversed(row_counts(capacity.slots)):
                self._recordings[rows] = self._record(rows)
        except RuntimeError as error:  # of CUDA, which can still compute the same directly
            self._recordings = {}
            if self.device.type == "cuda":  # a capture that fails may leave its stream in use
                torch.cuda.set_stream(torch.cuda.default_stream(self.device))
            print(f"serve: steps are not recorded, which is slow: {error}", flush=True)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One pass: decoding tokens alone by replay."""
        decoding = len(batch.decoding)
        if batch.adapted or batch.chunks or not self._recordings:
            return super().run(batch)
        rows = min(rows for rows in self._recordings if rows >= decoding)
        recording, extra = self._recordings[rows], rows - decoding
        unused = [(self.cache.spare, 0, 0)] * extra
        slots, positions, tokens = zip(*batch.decoding, *unused, strict=True)
        [inputs] = send(self.device, torch.int64, [*tokens, *positions, *slots])
        recording.inputs.copy_(inputs.view(3, rows))
        recording.replay()
        return recording.logits[:decoding]

    @torch.inference_mode()
    def _record(self, rows: int) -> Recording:
        """Record a step of so many rows; until it is replayed they write to the spare slot."""
        inputs = torch.zeros(3, rows, dtype=torch.int64, device=self.device)
        inputs[2] = self.cache.spare
        tokens, positions, slots = inputs
        wanted = torch.arange(rows, device=self.device)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)

        def step() -> torch.Tensor:
            used = (positions + 1).int()
            ragged = Ragged.of(starts, used, slots.int(), 1, self.cache.length)
            fixed = Step(self.cache, slots, positions, ragged=ragged)
            return self._pass(tokens[None], positions[None], fixed, wanted)

        return Recording(*self._capture(step), inputs, (wanted, starts))

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
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # as engines may be two
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()
        return graph.replay, logits


def row_counts(slots: int) -> list[int]:
    """The numbers of rows that are recorded: powers of two, and all slots."""
    return [*(1 << power for power in range((slots - 1).bit_length())), slots]
