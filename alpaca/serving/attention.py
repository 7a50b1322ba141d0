"""Attention over slots, registered with transformers, so that its models run unchanged.

One forward pass carries tokens of many sequences in one row: first one token of every decoding
sequence, then chunks of prompts. Linear layers see them all together, which is what makes batching
pay; attention reads each sequence's own slot. The query heads that share a key head are passed as
if they were positions, so that keys are read once, not repeated (grouped-query attention).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from alpaca.errors import UserError
from alpaca.serving.cache import LayerShape, SlotCache
from alpaca.serving.transfer import send
from alpaca.stored import ADVICE

NAME = "alpaca_slots"
CALL_COST = 128  # an attention call more costs about as much as reading this many tokens


@dataclass(frozen=True)
class PrefillChunk:
    """Part of a prompt in this pass: tokens [first, last) of it, in slot `slot`."""

    slot: int
    first: int
    last: int


@dataclass
class Step:
    """Where the tokens of one forward pass belong.

    The first `decoding` tokens are of that many slots in ascending order; the chunks follow.
    `lengths[i]` counts the tokens of slot `rows[i]`, the new one included; in a recorded step,
    which is replayed at other positions, it is the most that the recording reaches.
    """

    cache: SlotCache
    slots: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64
    rows: list[int]
    lengths: list[int]
    chunks: list[PrefillChunk] = field(default_factory=list)
    recorded: bool = False
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)
    _indices: dict[Any, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of decoding slots that are attended together; the same in every layer."""
        return spans(self.rows, self.lengths)

    def index(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Where rows [first, last) are, counted from the first; sent once a step."""
        name = (first, last, device)
        if name not in self._indices:
            low = self.rows[first]
            [self._indices[name]] = send(
                device, torch.int64, [row - low for row in self.rows[first:last]]
            )
        return self._indices[name]

    @property
    def decoding(self) -> int:
        """How many tokens are one sequence's next."""
        return len(self.rows)


@dataclass
class Probe:
    """Stands in for a Step once, to learn what each layer's keys look like."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step | Probe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, heads, tokens, head_dim), key and value alike.

    Returns (1, tokens, heads, head_dim). Raises UserError in a probe of attention of other kinds.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(step, Probe):
        if softcap is not None or s_aux is not None:
            kind = "caps its attention scores" if s_aux is None else "has attention sinks"
            raise UserError(f"The model {kind}, so it cannot be served here.", ADVICE)
        step.shapes[layer] = LayerShape(key.shape[1], key.shape[3], key.dtype, key.device)
        return torch.zeros_like(query.transpose(1, 2)), None
    step.cache.write(layer, step.slots, step.positions, key[0], value[0])
    keys, values = step.cache.layers[layer]
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    if step.decoding:
        fresh = query[0, :, : step.decoding].transpose(0, 1)
        out[: step.decoding] = _decode(step, fresh, keys, values, scaling, sliding_window)
    start = step.decoding
    for chunk in step.chunks:
        stop = start + chunk.last - chunk.first
        part = query[:, :, start:stop]
        out[start:stop] = _prefill(step, chunk, part, keys, values, scaling, sliding_window)
        start = stop
    return out.unsqueeze(0), None


def _decode(
    step: Step,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One token of each decoding slot: query and result (decoding, heads, head_dim)."""
    count, heads, size = query.shape
    grouped = query.reshape(count, keys.shape[1], heads // keys.shape[1], size)
    parts = []
    for first, last, length in step.spans:
        low, high = step.rows[first], step.rows[last - 1] + 1
        asked = grouped[first:last]
        holes = high - low > last - first
        if holes:  # slots in between that do not decode now: computed, and not used
            index = step.index(first, last, query.device)
            asked = grouped.new_zeros(high - low, *grouped.shape[1:])
            asked[index] = grouped[first:last]
        mask = _decode_mask(step, low, high, first, last, length, window, query)
        answer = F.scaled_dot_product_attention(
            asked, keys[low:high, :, :length], values[low:high, :, :length], mask, scale=scaling
        )
        parts.append(answer[index] if holes else answer)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(count, heads, size)


def spans(rows: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Cut ascending slots into runs worth attending together: (first, last, longest) each.

    A run is computed as a rectangle, slots by longest length. A slot joins the run before it while
    that wastes fewer tokens than a call of its own costs.
    """
    runs: list[tuple[int, int, int]] = []
    for at, length in enumerate(lengths):
        if runs:
            first, last, longest = runs[-1]
            joined = max(longest, length)
            wide = rows[at] + 1 - rows[first]
            apart = (rows[last - 1] + 1 - rows[first]) * longest + length
            if wide * joined - apart <= CALL_COST:
                runs[-1] = (first, at + 1, joined)
                continue
        runs.append((at, at + 1, length))
    return runs


def _decode_mask(
    step: Step, low: int, high: int, first: int, last: int,
    length: int, window: int | None, like: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """Additive mask (slots, 1, 1, length): a slot's own tokens, within the window if there is one.

    The same for every layer of a kind, so it is made once a step.
    """
    windowed = window is not None and length > window
    even_rows = high - low == last - first
    even = even_rows and min(step.lengths[first:last]) == length
    if even and not windowed and not step.recorded:
        return None
    name = (low, high, window if windowed else None, like.device)
    if name not in step.masks:
        ends = torch.full((high - low,), length, device=like.device)
        index = slice(None) if even_rows else step.index(first, last, like.device)
        ends[index] = step.positions[first:last].to(like.device) + 1
        at = torch.arange(length, device=like.device)
        seen = at < ends[:, None]
        if windowed:
            assert window is not None
            seen &= at >= ends[:, None] - window
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        step.masks[name] = mask.masked_fill_(~seen, -torch.inf)[:, None, None]
    return step.masks[name]


def _prefill(
    step: Step, chunk: PrefillChunk, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    scaling: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """A chunk of a prompt: query (1, heads, tokens, head_dim), result (tokens, heads, head_dim)."""
    repeat = query.shape[1] // keys.shape[1]
    known_keys, known_values = (
        part[chunk.slot, :, : chunk.last].repeat_interleave(repeat, dim=0).unsqueeze(0)
        for part in (keys, values)
    )
    windowed = window is not None and chunk.last > window
    whole = chunk.first == 0 and not windowed
    answer = F.scaled_dot_product_attention(
        query,
        known_keys,
        known_values,
        None if whole else _chunk_mask(step, chunk, window if windowed else None, query),
        is_causal=whole,
        scale=scaling,
    )
    return answer[0].transpose(0, 1)


def _chunk_mask(
    step: Step, chunk: PrefillChunk, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """Additive mask (tokens, last): each token sees those before it, and itself."""
    name = (chunk, window, like.device)
    if name not in step.masks:
        own = torch.arange(chunk.first, chunk.last, device=like.device)[:, None]
        at = torch.arange(chunk.last, device=like.device)
        seen = at <= own
        if window is not None:
            seen &= at > own - window
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        step.masks[name] = mask.masked_fill_(~seen, -torch.inf)
    return step.masks[name]


AttentionInterface.register(NAME, slot_attention)
