"""What a run trains and what it leaves frozen, counted from the model's shape; no torch.

Without an adapter every weight is trained, and none is frozen. With one, only its small matrices
are trained (`training/adapters.py`), and the base is held in the compute type, or in 4 or 8 bits.
"""

from dataclasses import dataclass
from functools import cache

from alpaca import quantization
from alpaca.errors import UserError
from alpaca.plan.shapes import Shape
from alpaca.recipe.arguments import AdapterFlags

ROOT = "base_model.model.model.layers."  # in PEFT's names, before a layer's number

# What each linear layer of a decoder layer reads: those with the same input share one tensor.
INPUTS = {
    "q_proj": "attention's norm",
    "k_proj": "attention's norm",
    "v_proj": "attention's norm",
    "o_proj": "attention",
    "gate_proj": "the MLP's norm",
    "up_proj": "the MLP's norm",
    "down_proj": "gate and up",
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its rank, the last parts of the names of the layers that it changes.

    `dropout`: some of its inputs are dropped. `quantized`: how all linear layers' weights are held.
    """

    rank: int
    targets: tuple[str, ...]
    dora: bool = False
    dropout: bool = False
    quantized: str = "no"

    def layers(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """Names, below `model.layers.N.`, and shapes (out, in) of a layer's adapted weights."""
        return {
            name: size
            for name, size in shape.linear().items()
            if name.rpartition(".")[2] in self.targets
        }

    def tensors(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all its tensors in PEFT's format, in a file's order."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (rows, width) in self.layers(shape).items():
            for number in range(shape.layers):
                module = f"{ROOT}{number}.{name}"
                found[f"{module}.lora_A.weight"] = (self.rank, width)
                found[f"{module}.lora_B.weight"] = (rows, self.rank)
                if self.dora:
                    found[f"{module}.lora_magnitude_vector"] = (rows,)
        return dict(sorted(found.items()))

    def computes_gated(self, shape: Shape) -> bool:
        """Whether an MLP keeps only what gate and up return (`training/lowrank.py`)."""
        plain = not self.dora and not self.dropout
        return plain and any(name.endswith("down_proj") for name in self.layers(shape))

    def quantizes(self, width: int) -> bool:
        """Whether the weight of a linear layer with `width` inputs is held in 4 or 8 bits."""
        return self.quantized != "no" and quantization.fits(self.quantized, width)

    def quantized_weights(self, shape: Shape) -> int:
        """How many weights of all layers are held in 4 or 8 bits."""
        sizes = shape.linear().values()
        return shape.layers * sum(rows * width for rows, width in sizes if self.quantizes(width))


def chosen(shape: Shape, flags: AdapterFlags) -> Adapter | None:
    """The adapter that the flags ask for; None: all weights are trained.

    Raises:
        UserError: the model has no layer of a given name.
    """
    if not flags.lora_rank:
        return None
    linear = {name.rpartition(".")[2] for name in shape.linear()}
    if unknown := sorted(set(flags.targets) - linear):
        raise UserError(
            f"--lora_target_modules {flags.lora_target_modules}: the model has no linear layer "
            f"{unknown[0]} that an adapter can change.",
            f"It has {', '.join(sorted(linear))}; all-linear adapts all of them.",
        )
    return Adapter(
        rank=flags.lora_rank,
        targets=tuple(sorted(flags.targets or linear)),
        dora=flags.use_dora,
        dropout=flags.lora_dropout > 0,
        quantized=flags.quantize_base,
    )


@dataclass(frozen=True)
class Weights:
    """Trained parameters, and the bytes of frozen ones: of one layer, and outside the layers.

    `tensors`: how many tensors are trained.
    """

    layers: int
    layer: int
    root: int
    frozen_layer: int
    frozen_root: int
    tensors: int

    @property
    def trained(self) -> int:
        """Parameters that have a master, a gradient and moments."""
        return self.layers * self.layer + self.root

    @property
    def frozen(self) -> int:
        """Bytes of all frozen weights."""
        return self.layers * self.frozen_layer + self.frozen_root


@cache
def weights(shape: Shape, adapter: Adapter | None, compute: int) -> Weights:
    """The weights of a run that computes in numbers of `compute` bytes."""
    if adapter is None:
        tensors = len(shape.tensors())
        return Weights(shape.layers, shape.layer_parameters, shape.root_parameters, 0, 0, tensors)
    sizes = adapter.layers(shape).values()
    held = compute * shape.layer_parameters
    for rows, width in shape.linear().values():
        if adapter.quantizes(width):
            held += rows * (sum(quantization.sizes(adapter.quantized, width)) - compute * width)
    trained = sum(adapter.rank * (rows + width) + rows * adapter.dora for rows, width in sizes)
    return Weights(
        layers=shape.layers,
        layer=trained,
        root=0,
        frozen_layer=held,
        frozen_root=compute * shape.root_parameters,
        tensors=shape.layers * len(sizes) * (2 + adapter.dora),
    )


def temporary(shape: Shape, adapter: Adapter, compute: int) -> int:
    """The most bytes that one linear layer needs for a moment, besides its inputs and outputs.

    A quantized weight is read back. int8 does so through two copies in fp32. DoRA measures the rows
    of the adapted weight: it makes B A from an identity matrix, and scales and adds it.
    """
    most = 0
    adapted = adapter.layers(shape)
    for name, (rows, width) in shape.linear().items():
        if adapter.quantizes(width):
            each = max(8, 4 + compute) if adapter.quantized == "int8" else compute
            most = max(most, each * rows * width)
        if adapter.dora and name in adapted:
            most = max(most, compute * (width * width + 3 * rows * width))
    return most


def saved(
    shape: Shape, adapter: Adapter, tokens: int, compute: int, *, cuda: bool, whole: bool
) -> int:
    """Bytes that the adapted linear layers of one decoder layer save for the backward pass.

    A saves its input, of which layers with the same input hold one; B saves A's output. DoRA also
    saves the base's and the adapter's output, which the trained row lengths multiply. Dropout gives
    each A an input of its own, and saves what it dropped.

    `whole`: attention has saved its output already, as one tensor.
    """
    sizes = adapter.layers(shape)
    numbers = sum(adapter.rank for _ in sizes)
    if adapter.dora:
        numbers += sum(2 * rows for rows, _ in sizes.values())
    if adapter.dropout:
        widths = sum(width for _, width in sizes.values())
        dropped = 1 if cuda else compute  # bytes of a number's mask
        return tokens * (compute * (numbers + widths) + dropped * widths)
    inputs = {INPUTS[name.rpartition(".")[2]]: width for name, (_, width) in sizes.items()}
    if whole:
        inputs.pop("attention", None)
    if adapter.computes_gated(shape):
        inputs.pop("gate and up")
    return tokens * compute * (numbers + sum(inputs.values()))
