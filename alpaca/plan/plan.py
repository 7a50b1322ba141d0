"""What a run needs, how long it takes, and whether it fits: pure functions.

They take the model's shape, the flags, the counted work and a machine, and return numbers. The
formulas are in memory, disk, duration and workload, each with its source.
"""

from dataclasses import asdict, dataclass
from typing import Any

from alpaca import heap, layout
from alpaca.plan import adapters, disk, duration
from alpaca.plan import memory as plan_memory
from alpaca.plan.devices import Device
from alpaca.plan.disk import adapter_bytes, checkpoint_bytes, export_bytes
from alpaca.plan.duration import FileTimes, Time
from alpaca.plan.memory import Memory, Setting
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload
from alpaca.recipe import rules
from alpaca.recipe.arguments import Arguments

# Host memory of a rank's process besides its tensors: Python, torch, CUDA's libraries and pinned
# buffers. Without CUDA it is measured (see memory.py); with CUDA this is an allowance.
CUDA_HOST = 4_000_000_000


@dataclass(frozen=True)
class Machine:
    """The hardware of a run: `ranks` devices in each of `nodes` nodes.

    `host`: bytes of RAM per node; `disk`: free bytes. None where not known.
    """

    device: Device
    ranks: int = 1
    nodes: int = 1
    host: int | None = None
    disk: int | None = None

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.ranks * self.nodes


@dataclass(frozen=True)
class Plan:
    """What a run needs; all sizes in bytes, `time` None where the device's speed isn't known.

    `time` is that of all steps, `files` that of loading, rehearsing, saving and exporting.

    `memory` is for one device, `host` for one node. `disk` is the peak, if a signal stops the run
    at most once. `trained`: how many of `parameters`, or of an adapter's, are trained. `export`:
    what the run leaves, an adapter or a model; `merged`: the merged model besides, 0 without one.
    """

    parameters: int
    trained: int
    machine: Machine
    setting: Setting
    work: Workload
    memory: Memory
    host: int
    checkpoint: int
    export: int
    merged: int
    disk: int
    saves: int
    time: Time | None
    files: FileTimes

    @property
    def seconds(self) -> float | None:
        """Expected duration of all steps; None where the device's speed isn't known."""
        return None if self.time is None else self.time.seconds

    @property
    def headroom(self) -> int:
        """Device memory left over; negative where it does not fit."""
        return self.machine.device.memory - self.memory.total

    @property
    def problems(self) -> list[str]:
        """One sentence for each resource that is too small; empty when the run fits."""
        machine = self.machine
        found = []
        if self.headroom < 0:
            found.append(_lacking("of device memory", self.memory.total, machine.device.memory))
        if machine.host is not None and self.host > machine.host and machine.device.cuda:
            found.append(_lacking("of RAM per node", self.host, machine.host))
        if machine.disk is not None and self.disk > machine.disk:
            found.append(_lacking("of disk", self.disk, machine.disk))
        return found

    @property
    def fits(self) -> bool:
        """Whether the run can be started."""
        return not self.problems

    def cost(self, price: float) -> float | None:
        """What the run costs at `price` per device and hour, files included."""
        if self.seconds is None:
            return None
        return (self.seconds + self.files.total) / 3600 * self.machine.world_size * price

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "headroom": self.headroom,
            "fits": self.fits,
            "problems": self.problems,
        }


def _lacking(what: str, needed: int, available: int) -> str:
    return f"needs {needed / 1e9:,.1f} GB {what} ({available / 1e9:,.1f} GB available)"


def make(shape: Shape, arguments: Arguments, machine: Machine, work: Workload) -> Plan:
    """Plan one run."""
    chosen = setting(shape, arguments, machine)
    runtime = plan_memory.CUDA_RUNTIME if machine.device.cuda else plan_memory.CPU_RUNTIME
    compiles = arguments.torch_compile or chosen.optimizer == rules.ADAMW_8BIT_BYTES
    if not machine.device.cuda and compiles:
        runtime += plan_memory.COMPILER
    if not machine.device.cuda and chosen.adapter is not None:
        runtime += plan_memory.ADAPTERS
    weights = chosen.weights(shape)
    memory = plan_memory.peak(shape, work.largest, chosen, runtime)
    whole = export_bytes(shape, arguments.export_dtype)
    exported = whole if chosen.adapter is None else adapter_bytes(shape, chosen.adapter)
    merged = whole if arguments.merge else 0
    models = arguments.save_only_model
    checkpoint = exported if models else checkpoint_bytes(weights, chosen.optimizer)
    time = duration.expected(shape, work, chosen, machine.device, machine.world_size, machine.nodes)
    written = disk.saves(arguments, work)
    host = host_bytes(shape, chosen, machine, memory, max(exported, merged))
    copied = checkpoint * machine.ranks // chosen.shards
    apart = None  # training waits for its saves
    if time is not None and _copies(arguments, machine, host + copied * 3 // 2):
        apart = time.seconds / max(1, written)
    return Plan(
        parameters=shape.parameters,
        trained=weights.trained,
        machine=machine,
        setting=chosen,
        work=work,
        memory=memory,
        host=host,
        checkpoint=checkpoint,
        export=exported,
        merged=merged,
        disk=disk.disk_bytes(arguments, work, checkpoint, exported + merged),
        saves=written,
        time=time,
        files=duration.file_times(
            shape,
            chosen,
            written,
            None if models else checkpoint,
            exported,
            merged,
            apart,
        ),
    )


def _copies(arguments: Arguments, machine: Machine, needed: int) -> bool:
    """Whether checkpoints are copied to memory and written from there (`checkpoint.Saver`)."""
    roomy = machine.host is None or needed <= machine.host
    return roomy and not arguments.moments_8bit


def setting(shape: Shape, arguments: Arguments, machine: Machine) -> Setting:
    """The settings of the trainer that follow from the flags and the machine."""
    device = machine.device
    offload = arguments.offload
    shards = rules.shards(arguments.sharding, machine.world_size, machine.ranks)
    half = rules.computes_bf16(arguments.bf16, fast=device.fast_bf16, cuda=device.cuda)
    adapter = adapters.chosen(shape, arguments)
    trained = adapters.weights(shape, adapter, 4).trained
    return Setting(
        shards=shards,
        compute=2 if half else 4,
        optimizer=rules.ADAMW_8BIT_BYTES if arguments.moments_8bit else rules.ADAMW_BYTES,
        checkpointing=arguments.gradient_checkpointing,
        offload=offload,
        regather=rules.regathers(arguments.sharding),
        once=rules.reduces_once(trained, shards, device.memory, offload=offload),
        cuda=device.cuda,
        logit=plan_memory.LOGIT if half else plan_memory.LOGIT_FP32,
        adapter=adapter,
        tcmalloc=heap.expected(),
    )


def host_bytes(
    shape: Shape, chosen: Setting, machine: Machine, memory: Memory, exported: int
) -> int:
    """RAM of one node: its processes, what is offloaded, and a shard of the export."""
    if not machine.device.cuda:
        return machine.ranks * memory.total
    weights = chosen.weights(shape)
    state = plan_memory.state_bytes(weights.trained, chosen.optimizer) + weights.frozen
    offloaded = state * machine.ranks // chosen.shards if chosen.offload else 0
    return machine.ranks * CUDA_HOST + offloaded + min(layout.SHARD_BYTES, exported)
