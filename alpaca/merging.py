"""The weights of an adapter and its base as one model, some rows at a time.

W + s B A is computed in float64 and rounded to fp32 once, so the fp32 result does not depend on the
order in which a machine adds. It is then rounded to the type that is written: stochastically, or to
the nearest. A base in 16 bits lies on the numbers of that type, and many changes by a LoRA are
smaller than half a step between them, so rounding to the nearest undoes those. Tensors that the
adapter does not change keep their bytes where the type stays.

Row by row, a matrix of any size takes some 100 MB: DoRA needs no more than the length of each row.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from alpaca import quantization, rounding, shards
from alpaca.adapter import Adapter, Change
from alpaca.errors import UserError
from alpaca.stored import Entry

ROUNDING = "stochastic"  # the default for 16 bits: bench/merge.py measured both
SEED = 0  # of a stochastic rounding
# What an adapter was trained on in place of a base tensor, by the tensor's name and value (out,
# in): for example, the value after quantization. It returns a tensor of the same shape, or the
# tensor itself.
BaseWeight = Callable[[str, Tensor], Tensor]


def as_trained(kind: str | None) -> BaseWeight | None:
    """What an adapter over weights quantized to `kind` was trained on; None: the weights as such.

    As in training, all matrices of the decoder's layers are quantized whose rows fit.
    """
    if kind is None:
        return None
    return lambda _, weight: quantization.rounded(kind, weight.float())


def seed_of(way: str) -> int | None:
    """The seed of a rounding: `nearest` (None) or `stochastic`."""
    return {"nearest": None, "stochastic": SEED}[way]


class Base:
    """A base model's tensors as an adapter was trained on them.

    `base_weight` is called with the whole matrices of the decoder's layers, and with no others:
    embedding, output matrix, norms and biases are never quantized.
    """

    def __init__(self, entries: Mapping[str, Entry], base_weight: BaseWeight | None = None) -> None:
        """`entries`: the tensors in the base's files."""
        self.entries = entries
        self._base_weight = base_weight
        self._held: tuple[str, Tensor] | None = None

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor."""
        entry = self.entries[name]
        if self._base_weight is None or ".layers." not in name or len(entry.shape) < 2:
            return shards.rows_of(entry, rows)
        if self._held is None or self._held[0] != name:
            self._held = None  # frees the one before
            self._held = (name, self._base_weight(name, shards.rows_of(entry, slice(None))))
        return self._held[1][rows]


class Merge:
    """The tensors of base + adapter, by name."""

    def __init__(self, base: Base, adapter: Adapter, seed: int | None) -> None:
        """`seed`: of a stochastic rounding; None rounds to the nearest."""
        self.base = base
        self.adapter = adapter
        self.seed = seed
        self._held: tuple[str, Change | None] | None = None

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """All rows of a tensor in order, in `dtype`."""
        for rows in shards.row_slices(self.base.entries[name].shape):
            yield self.rows(name, rows, dtype)

    def rows(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of a tensor, in `dtype`.

        Raises:
            UserError: they hold NaN or infinite numbers, or numbers too large for the type.
        """
        start, stop, _ = rows.indices(self.base.entries[name].shape[0])
        value = self.base.rows(name, slice(start, stop))
        change = self._change(name)
        if change is not None:
            value = change.rows(slice(start, stop)).merged(value.double())
        if not shards.finite(value):
            raise UserError(
                f"{name} holds NaN or infinite numbers.", "Fetch, convert or train it again."
            )
        if value.dtype == dtype:
            return value
        row = value[0].numel() if len(value) else 0
        return rounding.rounded(value.float(), dtype, self.seed, "merge", name, start * row)

    def _change(self, name: str) -> Change | None:
        """The change of a tensor, in float64; the last one is kept."""
        if self._held is None or self._held[0] != name:
            module = name.removesuffix(".weight")
            change = self.adapter.change(module) if module != name else None
            self._held = (name, change.double() if change is not None else None)
        return self._held[1]
