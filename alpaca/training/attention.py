"""Attention for packs, registered with transformers under the name `alpaca_packed`.

Each segment of a pack attends causally, aligned at the end, to its shared prefix, to what that
attends to, and to itself. Once these keys and values are gathered, this is ordinary variable-length
attention:
`varlen_attn` where its kernel is supported, on a CPU blocks of queries, else one
`scaled_dot_product_attention` per segment. The model's code is unchanged: it passes the pack's
index along as a keyword argument.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from alpaca.recipe.packing import Segment

NAME = "alpaca_packed"
BLOCK = 128  # queries that a CPU computes together


@dataclass(frozen=True)
class PackIndex:
    """Where each segment's queries, keys and values are.

    gather: (keys,) positions in the pack; segment s attends with queries
    `cu_q[s]:cu_q[s+1]` of the pack to keys `gather[cu_k[s]:cu_k[s+1]]`. All int; cu_* int32.
    """

    segments: tuple[Segment, ...]
    gather: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


def index(segments: Sequence[Segment], device: torch.device) -> PackIndex:
    """The index tensors of a pack, on `device`."""
    known: dict[int, list[int]] = {}  # the keys of each segment, by its start
    for s in segments:
        before = known[s.prefix_start] if s.prefix_start < s.prefix_end else []
        known[s.start] = [*before, *range(s.start, s.end)]
    keys = list(known.values())
    ends = torch.tensor([0] + [s.end for s in segments], dtype=torch.int32)
    counts = torch.tensor([0] + [len(k) for k in keys])
    return PackIndex(
        segments=tuple(segments),
        gather=torch.tensor([i for k in keys for i in k], device=device),
        cu_q=ends.to(device),
        cu_k=counts.cumsum(0).to(torch.int32).to(device),
        max_q=max(s.end - s.start for s in segments),
        max_k=int(counts.max()),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    pack: PackIndex,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, head_dim) to (1, tokens, ...)."""
    capability = _capability(query.device) if query.is_cuda else None
    if has_kernel(query.dtype, capability):
        run = varlen
    else:
        run = blockwise if query.device.type == "cpu" else segmentwise
    out = run(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scaling, pack
    )
    return out.unsqueeze(0), None


def has_kernel(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether `varlen_attn` supports the dtype on a GPU of this compute capability; None: a CPU.

    Its kernel is FlashAttention: fp16 and bf16 on Ampere and newer (Dao, "FlashAttention-2", 2023).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return half and capability is not None and capability >= (8, 0)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, pack: PackIndex
) -> torch.Tensor:
    """One fused kernel over all segments; (tokens, heads, head_dim) in and out."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        causal["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    out: Any = varlen_attn(
        query.contiguous(),
        key[pack.gather],
        value[pack.gather],
        pack.cu_q,
        pack.cu_k,
        pack.max_q,
        pack.max_k,
        scale=scaling,
        **causal,
    )
    return cast(torch.Tensor, out)


def segmentwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, pack: PackIndex
) -> torch.Tensor:
    """Any device and type: one call per segment; (tokens, heads, head_dim) in and out.

    The pack is split once and joined once. With one slice per segment, the backward pass would
    write a gradient as large as the whole pack for each segment.
    """
    sizes = [s.end - s.start for s in pack.segments]
    pieces = [t.transpose(0, 1).split(sizes, dim=1) for t in (query, key, value)]
    prefixes = {s.prefix_start for s in pack.segments if s.prefix_start < s.prefix_end}
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each prefix, by its start
    results = []
    for s, q, k, v in zip(pack.segments, *pieces, strict=True):
        shared = 0
        if s.prefix_start < s.prefix_end:
            before = known[s.prefix_start]
            shared = before[0].shape[1]
            k, v = (torch.cat(both, dim=1) for both in zip(before, (k, v), strict=True))
        if s.start in prefixes:
            known[s.start] = k, v
        mask = _causal_mask(shared, q.shape[1], query.dtype, query.device)
        results.append(
            F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[0] != k.shape[0],
            )[0]
        )
    return torch.cat(results, dim=1).transpose(0, 1)


def blockwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, pack: PackIndex
) -> torch.Tensor:
    """A CPU: blocks of a segment's queries; (tokens, heads, head_dim) in and out.

    torch's kernel computes all pairs of a query and a key, and masks some. A block has only keys up
    to its end, which spares nearly half of the pairs. Only queries, keys, values and results are
    kept, once for the pack.
    """
    result: torch.Tensor = _Blocks.apply(query, key, value, scaling, pack)
    return result


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        pack: PackIndex,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        sums = []
        for s, positions in _keys(pack):
            keys, values = key[positions], value[positions]
            for rows, seen, masked in _blocks(s, len(positions), query.dtype):
                part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *map(_heads, (query[rows], keys[:seen], values[:seen])),
                    **masked,
                    scale=scaling,
                )
                out[rows] = part[0].transpose(0, 1)
                sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.scaling, ctx.pack = scaling, pack
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        totals = iter(sums)
        for s, positions in _keys(ctx.pack):
            keys, values = key[positions], value[positions]
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            for rows, seen, masked in _blocks(s, len(positions), query.dtype):
                given = (gradients[0][rows], query[rows], keys[:seen], values[:seen], out[rows])
                q, k, v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *map(_heads, given),
                    next(totals),
                    dropout_p=0.0,
                    **masked,
                    scale=ctx.scaling,
                )
                of_query[rows] = q[0].transpose(0, 1)
                of_keys[:seen] += k[0].transpose(0, 1)
                of_values[:seen] += v[0].transpose(0, 1)
            of_key.index_add_(0, positions, of_keys)
            of_value.index_add_(0, positions, of_values)
        return of_query, of_key, of_value, None, None


def _heads(tensor: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) to (1, heads, tokens, head_dim)."""
    return tensor.transpose(0, 1)[None]


def _keys(pack: PackIndex) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Each segment, and the positions of its keys: of its prefix, then its own."""
    ends = pack.cu_k.tolist()
    for s, start, end in zip(pack.segments, ends[:-1], ends[1:], strict=True):
        yield s, pack.gather[start:end]


def _blocks(
    s: Segment, keys: int, dtype: torch.dtype
) -> Iterator[tuple[slice, int, dict[str, Any]]]:
    """The blocks of a segment with `keys` keys: rows of the pack, keys they see, options."""
    before = keys - (s.end - s.start)
    for start in range(s.start, s.end, BLOCK):
        end = min(s.end, start + BLOCK)
        mask = _causal_mask(before + start - s.start, end - start, dtype, torch.device("cpu"))
        masked = {"is_causal": mask is None, "attn_mask": mask}
        yield slice(start, end), before + end - s.start, masked


def _causal_mask(
    shared: int, own: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Additive mask (own, shared + own), causal, aligned at the end; None: plain causal."""
    if not shared:
        return None
    whole = shared + own
    return _triangle(1 << (whole - 1).bit_length(), dtype, device)[shared:whole, :whole]


@lru_cache(maxsize=16)
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    blocked = torch.ones(size, size, dtype=torch.bool, device=device).triu(diagonal=1)
    return torch.zeros(size, size, dtype=dtype, device=device).masked_fill(blocked, -torch.inf)


def _no_mask(*_: Any, **__: Any) -> None:
    """Build no mask: the pack's index defines what each token attends to."""


# Segments differ from pack to pack, so the function stays outside the graphs of compiled layers.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(NAME, _no_mask)
