"""How long a run takes and what it costs: arithmetic against the device's published peaks.

Matrix products dominate. FSDP's traffic overlaps them, so a pack takes the longer of the two. The
share of the peak, or of the links, that is reached is an assumption, printed next to the time.
"""

from dataclasses import dataclass

from alpaca import quantization
from alpaca.plan import adapters
from alpaca.plan.adapters import Adapter
from alpaca.plan.devices import Device
from alpaca.plan.memory import Setting
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload

# torchtitan's tables report 33-39% for Llama 3.1 8B on H100 and 57% on A100 (benchmarks/, 2024,
# sequences of 8,192); packs are shorter and the model is eager, so the low end is assumed.
EFFICIENCY = 0.35
CPU_EFFICIENCY = 0.6  # of numpy's own rate, which is already measured
LINK_EFFICIENCY = 0.7  # of a link's nominal bandwidth that a collective reaches
PCI = 16e9  # bytes/s between a card and its node's memory: half of generation 4's peak
HOST_BANDWIDTH = 100e9  # bytes/s of a node's memory that its ranks share in the update
DISK = 1e9  # bytes/s at which a node's files are read and written: a common SSD's
# Weights/s that a CPU reads back from 4 or 8 bits, and that a rank rounds to them while it loads:
# four cores at 25 and 110 million each (measured, docs/adapters.md). Cards are assumed to read back
# at the bandwidth of their memory; the rounding is done by their node's CPU.
CPU_READING = 600e6
QUANTIZING = {"nf4": 100e6, "int8": 440e6}
NETWORK = 25e9  # bytes/s from node to node for each GPU: 200 Gb/s InfiniBand, as in a DGX A100


@dataclass(frozen=True)
class Time:
    """Seconds of all steps, and what limits them: "products", or "traffic" between devices."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class FileTimes:
    """Seconds that a run's files take besides its steps."""

    loading: float
    rehearsal: float
    saving: float
    export: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.loading + self.rehearsal + self.saving + self.export


def file_times(
    shape: Shape,
    setting: Setting,
    saves: int,
    checkpoint: int | None,
    exported: int,
    merged: int,
    apart: float | None,
) -> FileTimes:
    """Expected seconds for the files of a run that writes `saves` checkpoints.

    `checkpoint`: its size; None where checkpoints are models, exported as the last one is. `apart`:
    seconds between two of them, in which a copy in host memory is written; None where training
    waits for each. It always waits for the last. An export is written, and read back twice (its
    tensors, its files). The base weights are read once, in 16 bits, and rounded where the run holds
    them in fewer. A `merged` model is written at the end, from the base
    that is read once more.
    """
    exporting = 3 * exported / DISK
    writing = exporting if checkpoint is None else checkpoint / DISK
    waits = saves * writing
    if apart is not None and checkpoint is not None and saves:
        own = checkpoint / setting.shards / PCI  # copied from the device
        waits = (saves - 1) * (own + max(0.0, writing - apart)) + writing
    loading = 2 * shape.parameters / DISK
    if setting.adapter is not None and setting.adapter.quantized != "no":
        rounded = setting.adapter.quantized_weights(shape) / setting.shards
        loading += rounded / QUANTIZING[setting.adapter.quantized]
    return FileTimes(
        loading=loading,
        rehearsal=exported / DISK,
        saving=waits,
        export=exporting + (2 * shape.parameters + 3 * merged) / DISK * bool(merged),
    )


def flops(
    shape: Shape, work: Workload, checkpointing: bool, adapter: Adapter | None = None
) -> float:
    """Floating-point operations of the whole run, recomputed ones included.

    6 for each weight and token (Kaplan et al., "Scaling Laws for Neural Language Models", 2020,
    section 2.1: 2 forward, 4 backward). 8 in the layers with checkpointing, which repeats the
    forward pass. A frozen weight has no gradient, so it takes 2 less. The output matrix counts for
    targets only. Attention: 4 x width for each pair of query and key forward, twice that backward.
    Reading the embedding is not a product.
    """
    per_weight = 8 if checkpointing else 6
    if adapter is None:
        in_layer, table = per_weight * shape.layer_parameters, 6
    else:
        trained = adapters.weights(shape, adapter, 4).layer
        in_layer, table = per_weight * trained + (per_weight - 2) * shape.layer_parameters, 4
    layers = shape.layers * in_layer * work.tokens
    pairs = 2 * per_weight * shape.layers * shape.heads * shape.head * work.attended
    return float(layers + pairs + table * shape.table_parameters * work.targets)


def reading(shape: Shape, work: Workload, setting: Setting, device: Device) -> float:
    """Seconds in which a rank reads quantized weights back: in each pass of each pack, once.

    Their bytes are read and the weight is written, in the compute type.
    """
    adapter = setting.adapter
    if adapter is None or adapter.quantized == "no":
        return 0.0
    numbers = adapter.quantized_weights(shape) * work.packs * (3 if setting.checkpointing else 2)
    if not device.cuda:
        return numbers / CPU_READING
    each = quantization.BITS[adapter.quantized] / 8 + setting.compute
    return 0.0 if device.bandwidth is None else numbers * each / device.bandwidth


def reference_flops(shape: Shape, work: Workload) -> float:
    """What DPO computes besides: a forward pass of each pack, 2 for each weight and token."""
    if not work.reference:
        return 0.0
    layers = 2 * shape.layers * shape.layer_parameters * work.tokens
    pairs = 4 * shape.layers * shape.heads * shape.head * work.attended
    return float(layers + pairs + 2 * shape.table_parameters * work.targets)


def traffic(
    shape: Shape, work: Workload, setting: Setting, link: float, ranks: int, nodes: int
) -> float:
    """Seconds of communication of a rank's parameters and gradients, in the whole run.

    Weights are gathered in the compute type, for the forward and again for the backward pass;
    frozen ones as they are held, and not where each rank holds all. Gradients, of what is trained,
    are scattered in fp32, with each pack or once per step (Zhao et al., "PyTorch FSDP", 2023,
    section 3.2). Copies of a shard are then all-reduced, which sends each byte twice round
    the ring (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). A node's data
    leaves it once, through the network of all its devices; inside it moves at `link` bytes/s.
    """
    within = ranks // nodes
    out = NETWORK * within
    scatters = work.steps if setting.once else work.packs
    gathers = (2 if setting.regather else 1) * work.packs
    weights = setting.weights(shape)
    each = (gathers * setting.compute + 4 * scatters) * weights.trained
    each += gathers * weights.frozen
    inner = link if setting.shards <= within else min(link, out)
    spent = each * (1 - 1 / setting.shards) / inner
    copies = ranks // setting.shards
    if copies > 1:
        # devices of a node that hold different shards share the node's network
        outer = link if nodes == 1 else min(link, out / min(setting.shards, within))
        spent += 8 * scatters * weights.trained / setting.shards * (1 - 1 / copies) / outer
    return spent / LINK_EFFICIENCY


def expected(
    shape: Shape, work: Workload, setting: Setting, device: Device, ranks: int, nodes: int
) -> Time | None:
    """Expected duration of all steps; None where the device's speed isn't known.

    `ranks`: of all nodes. A run in fp32 is compared with the device's fp32 peak.
    """
    rate = device.bf16 if setting.compute == 2 and device.cuda else device.fp32
    if rate is None:
        return None
    reached = rate * (EFFICIENCY if device.cuda else CPU_EFFICIENCY)
    weights = setting.weights(shape)
    needed = flops(shape, work, setting.checkpointing, setting.adapter)
    computing = (needed + reference_flops(shape, work)) / (reached * ranks)
    computing += reading(shape, work, setting, device)
    moving = 0.0
    if device.link is not None and ranks > 1:
        moving = traffic(shape, work, setting, device.link, ranks, nodes)
    updating = 0.0
    if device.bandwidth is not None:
        # AdamW reads weights, gradients and two moments, and writes all but the gradients.
        each = (8 + 4 + 2 * setting.optimizer) * weights.trained / setting.shards
        updating = work.steps * each / device.bandwidth
    if setting.offload and device.cuda:
        # Each pack copies the weights to the device twice and the gradients to the host once.
        # The update runs on the CPU.
        copied = 12 * weights.trained + 2 * weights.frozen
        moving += work.packs * copied / setting.shards / PCI
        updating *= (device.bandwidth or 0) * (ranks // nodes) / HOST_BANDWIDTH
    bound = "traffic" if moving > computing else "products"
    return Time(max(computing, moving) + updating, bound)
