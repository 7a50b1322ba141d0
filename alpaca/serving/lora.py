"""LoRA adapters in a forward pass: each changes the rows of its own sequences, beside one base.

A linear layer computes the base's product for all rows (tokens) together, as without adapters. Then
the rows of each adapter get their change, s B A x; no others are touched. Which rows are whose is
found once per pass. The layers are as they were before and after a pass with such rows.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from alpaca.adapter import Adapter, Change
from alpaca.serving.packed import BlockedLinear, HalfLinear
from alpaca.serving.transfer import send
from alpaca.tokens import Codec

Prefix = tuple[tuple[int, ...], list[Tensor]]  # tokens, and their keys and values (`SlotCache`)


@dataclass(frozen=True)
class LayerChange:
    """An adapter's change of one linear layer, in fp32 on the layer's device.

    down: A transposed, (in, rank). up: s B transposed, (rank, out). DoRA multiplies each output but
    its bias by a factor: `up` holds it, and `stretch`, (out,), is that factor minus 1.
    """

    down: Tensor
    up: Tensor
    stretch: Tensor | None = None
    bias: Tensor | None = None  # the layer's, with `stretch`

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        parts = (self.down, self.up, self.stretch)
        return sum(part.nbytes for part in parts if part is not None)

    def add(self, inputs: Tensor, product: Tensor) -> None:
        """Change `product` (rows, out) in place; `inputs` is (rows, in)."""
        inner = inputs.float() @ self.down
        if self.stretch is None and product.dtype == torch.float32:
            product.addmm_(inner, self.up)
            return
        added = inner @ self.up
        if self.stretch is not None:
            added += self.stretch * (product if self.bias is None else product - self.bias)
        product.add_(added)  # summed in fp32, and rounded once to the product's type


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in memory; it is freed when no name and no running request refers to it.

    codec: of its own tokenizer files, if they differ from the base's. prefixes: the prompts' common
    beginnings, as this adapter computes them. requests: how many asked for it; the engine counts.
    """

    name: str
    layers: dict[nn.Module, LayerChange]
    codec: Codec | None = None
    prefixes: list[Prefix] = field(default_factory=list)
    requests: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def bytes(self) -> int:
        """Memory of its matrices."""
        return sum(change.bytes for change in self.layers.values())


def layers_of(adapter: Adapter, model: nn.Module) -> dict[nn.Module, LayerChange]:
    """The changes of an adapter whose base is `model`, which `Adapter.check_base` decides."""
    layers = ((model.get_submodule(name), change) for name, change in adapter.changes())
    return {layer: _prepared(change, layer) for layer, change in layers}


def _prepared(change: Change, layer: nn.Module) -> LayerChange:
    device = device_of(layer)
    # a copy: what is read from a file may change with the file
    down, up = change.down.to(device, copy=True), change.scaling * change.up.to(device)
    if change.magnitude is None:
        return LayerChange(down.t(), up.t())
    weight, bias = _parameters(layer)
    moved = Change(down, change.up.to(device), change.scaling, change.magnitude.to(device))
    factors = moved.row_factors(weight.float())
    return LayerChange(
        down.t(), (factors[:, None] * up).t(), factors - 1, None if bias is None else bias.float()
    )


def device_of(layer: nn.Module) -> torch.device:
    """Where a linear layer computes."""
    return _parameters(layer)[0].device if isinstance(layer, nn.Linear) else torch.device("cpu")


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias that a layer multiplies with and adds."""
    if isinstance(layer, HalfLinear | BlockedLinear):
        return layer.unpacked()
    assert isinstance(layer, nn.Linear)
    with align_module_device(layer):  # accelerate may keep them elsewhere until they are used
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


@contextmanager
def applied(
    adapted: Mapping[LoadedAdapter, Sequence[int]], head: nn.Module, wanted: Sequence[int]
) -> Iterator[None]:
    """Within the context, a pass of the model changes the rows of each adapter.

    `adapted` gives the pass's token indices of each adapter, ascending. The output layer `head`
    computes only the tokens `wanted`.
    """
    own = {adapter: set(tokens) for adapter, tokens in adapted.items()}
    last = {a: [at for at, token in enumerate(wanted) if token in own[a]] for a in adapted}
    known: dict[tuple[bool, tuple[LoadedAdapter, ...]], _Rows] = {}
    changed: dict[nn.Module, list[LoadedAdapter]] = {}
    for adapter in adapted:
        for layer in adapter.layers:
            changed.setdefault(layer, []).append(adapter)
    methods: dict[nn.Module, Any] = {}
    for layer, adapters in changed.items():
        key = layer is head, tuple(adapters)
        if key not in known:
            known[key] = _Rows([(last if layer is head else adapted)[one] for one in adapters])
        changes = [adapter.layers[layer] for adapter in adapters]
        methods[layer] = partial(_changed, layer.forward, changes, known[key])
    # A method of the instance itself; torch's forward hooks cost 3% of a step (bench/LOG.md).
    before = {layer: vars(layer).get("forward") for layer in methods}  # accelerate's, if it has one
    for layer, method in methods.items():
        vars(layer)["forward"] = method
    try:
        yield
    finally:
        for layer, method in before.items():
            vars(layer)["forward"] = method
            if method is None:
                del vars(layer)["forward"]


class _Rows:
    """The rows of some adapters, one adapter after the other; the same in many layers."""

    def __init__(self, each: Sequence[Sequence[int]]) -> None:
        self._all = [row for rows in each for row in rows]
        first = self._all[0] if self._all else 0
        run = range(first, first + len(self._all))
        self._run = slice(run.start, run.stop) if self._all == list(run) else None
        ends = list(accumulate(map(len, each), initial=0))
        self.parts = [slice(*ends) for ends in pairwise(ends)]
        self._sent: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> slice | Tensor:
        """All of them: a run, or indices, which are sent to a device once."""
        if self._run is not None:
            return self._run
        if device not in self._sent:
            [self._sent[device]] = send(device, torch.int64, self._all)
        return self._sent[device]


def _changed(
    product_of: Callable[[Tensor], Tensor], changes: list[LayerChange], rows: _Rows, inputs: Tensor
) -> Tensor:
    """A linear layer with its changes: (1, tokens, in) -> (1, tokens, out)."""
    product = product_of(inputs)
    out, given = product[0], inputs[0].to(product.device)  # a model may span devices
    where = rows.on(out.device)
    if isinstance(where, slice):
        given, own = given[where], out[where]
    else:
        given, own = given.index_select(0, where), out.index_select(0, where)
    for change, part in zip(changes, rows.parts, strict=True):
        change.add(given[part], own[part])
    if not isinstance(where, slice):
        out.index_copy_(0, where, own)
    return product
