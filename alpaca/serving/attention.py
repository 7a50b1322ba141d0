"""Attention over cache slots, registered with transformers, so that its models run unchanged.

One forward pass concatenates tokens of many sequences: first one token of each decoding sequence,
then prompt chunks. Linear layers process all tokens together, which makes batching efficient.
Attention reads each sequence's own slot: on a GPU by one call of FlashAttention for the whole pass
(`flash`), elsewhere by calls for runs of slots and for chunks. In grouped-query attention, the
query heads that share a key head are passed as if they were positions there, so that keys are read
once instead of repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from alpaca.errors import UserError
from alpaca.serving.cache import PAGE, LayerShape, SlotCache
from alpaca.serving.transfer import send
from alpaca.stored import ADVICE

NAME = "alpaca_slots"
CALL_COST = 128  # one more attention call costs about as much as reading this many tokens


@dataclass(frozen=True)
class PrefillChunk:
    """The part of a prompt that this pass computes: its tokens [first, last), in slot `slot`."""

    slot: int
    first: int
    last: int


@dataclass
class Ragged:
    """The sequences of a pass for `flash`: int32 tensors, so that lengths are data and not shape.

    starts: (sequences + 1,), where each one's queries begin; keys: the same of whole slots, which
    is asked for but not used where there are pages. used: (sequences,), its tokens, with those of
    this pass. table: (sequences, pages of a slot), its pages. most: the most queries that one has.
    """

    starts: torch.Tensor
    keys: torch.Tensor
    used: torch.Tensor
    table: torch.Tensor
    most: int

    @classmethod
    def of(
        cls, starts: torch.Tensor, used: torch.Tensor, slots: torch.Tensor, most: int, length: int
    ) -> Self:
        """For sequences in `slots`, which are of `length` in the cache; once for all layers."""
        pages = torch.arange(length // PAGE, dtype=torch.int32, device=slots.device)
        return cls(starts, starts * length, used, slots[:, None] * len(pages) + pages, most)

    @classmethod
    def sent(
        cls,
        device: torch.device,
        counts: Sequence[int],
        used: Sequence[int],
        slots: Sequence[int],
        length: int,
    ) -> Self:
        """For sequences of which a pass computes the last `counts` tokens each."""
        starts, used_there, slots_there = send(
            device, torch.int32, [0, *accumulate(counts)], used, slots
        )
        return cls.of(starts, used_there, slots_there, max(counts), length)


@dataclass
class Step:
    """Maps the tokens of one forward pass to slots and positions.

    The first `decoding` tokens belong to the slots `rows`, in ascending order; the chunks follow.
    `lengths[i]` counts the tokens of slot `rows[i]`, including the new one. Where `ragged` is given
    it says the same of all sequences, and those three are not needed.
    """

    cache: SlotCache
    slots: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    ragged: Ragged | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)
    _indices: dict[Any, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of decoding slots that share one attention call; the same in every layer."""
        return spans(self.rows, self.lengths)

    def index(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Slots of rows [first, last), counted from the first one; sent once per step."""
        name = (first, last, device)
        if name not in self._indices:
            low = self.rows[first]
            [self._indices[name]] = send(
                device, torch.int64, [row - low for row in self.rows[first:last]]
            )
        return self._indices[name]

    @property
    def decoding(self) -> int:
        """Number of decoding sequences; each has one token in the pass."""
        return len(self.rows)


@dataclass
class Probe:
    """Replaces the Step in a trial pass that records the shape of each layer's keys."""

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

    Returns (1, tokens, heads, head_dim). With a Probe, raises UserError for attention with capped
    scores or attention sinks.
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
    if step.ragged is not None:
        flat = query[0].transpose(0, 1)
        return flash(flat, keys, values, step.ragged, scaling, sliding_window).unsqueeze(0), None
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    if step.decoding:
        decode_query = query[0, :, : step.decoding].transpose(0, 1)
        out[: step.decoding] = _decode(step, decode_query, keys, values, scaling, sliding_window)
    start = step.decoding
    for chunk in step.chunks:
        stop = start + chunk.last - chunk.first
        part = query[:, :, start:stop]
        out[start:stop] = _prefill(step, chunk, part, keys, values, scaling, sliding_window)
        start = stop
    return out.unsqueeze(0), None


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ragged: Ragged,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """All tokens of a pass: query and result (tokens, heads, head_dim), keys as in the cache.

    num_splits=1: with more, paged keys give rows that are never written (pytorch#194167); and so a
    sequence's result does not depend on the others.
    """
    device = query.device  # a model may span devices
    attended = varlen_attn(
        query.contiguous(),
        keys.reshape(-1, PAGE, *keys.shape[2:]),
        values.reshape(-1, PAGE, *values.shape[2:]),
        ragged.starts.to(device),
        ragged.keys.to(device),
        ragged.most,
        keys.shape[1],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=ragged.used.to(device),
        block_table=ragged.table.to(device),
        num_splits=1,
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def flash_works(shape: LayerShape, groups: int) -> bool:
    """Whether `flash` computes here what plain attention does, with `groups` queries for a key.

    Tried, because kernels differ in what they take, and a wrong one need not say so.
    """

    def some(*size: int) -> torch.Tensor:
        drawn = torch.randn(*size, shape.head_dim, generator=torch.Generator().manual_seed(0))
        return drawn.to(shape.device, shape.dtype)

    keys = some(4, 2 * PAGE, shape.heads)
    values = keys.flip(1)
    lengths, slots = [PAGE + 40, 1, 400], [2, 0, 1]
    for counts, window in (([1, 1, 1], None), ([1, 1, 70], None), ([1, 1, 70], 33)):
        query = some(sum(counts), groups * shape.heads)
        ragged = Ragged.sent(shape.device, counts, lengths, slots, keys.shape[1])
        try:
            found = flash(query, keys, values, ragged, None, window).float()
        except (RuntimeError, TypeError, ValueError):
            return False
        first = 0
        for count, length, slot in zip(counts, lengths, slots, strict=True):
            back = torch.arange(length - count, length)[:, None] - torch.arange(length)
            wanted = F.scaled_dot_product_attention(
                query[first : first + count].float().transpose(0, 1),
                keys[slot, :length].float().transpose(0, 1),
                values[slot, :length].float().transpose(0, 1),
                ((back >= 0) & (back < (window or length))).to(shape.device),
                enable_gqa=True,
            ).transpose(0, 1)
            if not torch.allclose(found[first : first + count], wanted, atol=2e-2):
                return False
            first += count
    return True


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
        padded = grouped[first:last]
        holes = high - low > last - first
        if holes:  # slots in between that are not decoding: computed, but not used
            index = step.index(first, last, query.device)
            padded = grouped.new_zeros(high - low, *grouped.shape[1:])
            padded[index] = grouped[first:last]
        mask = _decode_mask(step, low, high, first, last, length, window, query)
        attended = F.scaled_dot_product_attention(
            padded, keys[low:high, :, :length], values[low:high, :, :length], mask, scale=scaling
        )
        parts.append(attended[index] if holes else attended)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(count, heads, size)


def spans(rows: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Cut ascending slots into runs that share one attention call: (first, last, longest) each.

    A run is computed as a rectangle: its slots times its longest length. A slot joins the previous
    run if that wastes fewer tokens than a separate call costs.
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
    step: Step,
    low: int,
    high: int,
    first: int,
    last: int,
    length: int,
    window: int | None,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """Additive mask (slots, 1, 1, length): a slot's own tokens, within the window if there is one.

    It is the same for all layers with the same window, so it is made once per step.
    """
    windowed = window is not None and length > window
    even_rows = high - low == last - first
    even = even_rows and min(step.lengths[first:last]) == length
    if even and not windowed:
        return None
    name = (low, high, window if windowed else None, like.device)
    if name not in step.masks:
        ends = torch.full((high - low,), length, device=like.device)
        index = slice(None) if even_rows else step.index(first, last, like.device)
        ends[index] = step.positions[first:last].to(like.device) + 1
        at = torch.arange(length, device=like.device)
        visible = at < ends[:, None]
        if windowed:
            assert window is not None
            visible &= at >= ends[:, None] - window
        mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        step.masks[name] = mask.masked_fill_(~visible, -torch.inf)[:, None, None]
    return step.masks[name]


def _prefill(
    step: Step,
    chunk: PrefillChunk,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """A chunk of a prompt: query (1, heads, tokens, head_dim), result (tokens, heads, head_dim)."""
    repeat = query.shape[1] // keys.shape[1]
    repeated_keys, repeated_values = (
        part[chunk.slot, :, : chunk.last].repeat_interleave(repeat, dim=0).unsqueeze(0)
        for part in (keys, values)
    )
    windowed = window is not None and chunk.last > window
    whole = chunk.first == 0 and not windowed
    attended = F.scaled_dot_product_attention(
        query,
        repeated_keys,
        repeated_values,
        None if whole else _chunk_mask(step, chunk, window if windowed else None, query),
        is_causal=whole,
        scale=scaling,
    )
    return attended[0].transpose(0, 1)


def _chunk_mask(
    step: Step, chunk: PrefillChunk, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """Additive mask (tokens, last): each token sees itself and the tokens before it."""
    name = (chunk, window, like.device)
    if name not in step.masks:
        own = torch.arange(chunk.first, chunk.last, device=like.device)[:, None]
        at = torch.arange(chunk.last, device=like.device)
        visible = at <= own
        if window is not None:
            visible &= at > own - window
        mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        step.masks[name] = mask.masked_fill_(~visible, -torch.inf)
    return step.masks[name]


AttentionInterface.register(NAME, slot_attention)
