"""Know before you pay: what a run needs, how long it takes, and whether it fits. Pure.

Takes the model's shape, the flags, the counted work and a machine, and returns numbers. The
formulas are beside this module, each with its source: plan_memory, plan_time, plan_data.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from alpaca.training import plan_memory, plan_time
from alpaca.training.arguments import Arguments
from alpaca.training.gpus import Device
from alpaca.training.plan_data import Work
from alpaca.training.plan_memory import Memory, Setting
from alpaca.training.plan_time import Time
from alpaca.training.shapes import Shape

EXPORT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes an element
SHARD_BYTES = 5_000_000_000  # largest file of an export, as in alpaca/shards.py
# What a rank's process takes of the node's memory beside its tensors: Python, torch, CUDA's
# libraries and pinned buffers; measured without CUDA (see plan_memory), an allowance with it.
CUDA_HOST = 4_000_000_000


@dataclass(frozen=True)
class Machine:
    """What a run gets: `ranks` devices in each of `nodes` nodes; bytes of RAM a node, free disk.

    None where it isn't known.
    """

    device: Device
    ranks: int = 1
    nodes: int = 1
    host: int | None = None
    disk: int | None = None

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.ranks * self.nodes


@dataclass(frozen=True)
class Plan:
    """What a run needs; all sizes in bytes, `time` None where the device's speed isn't known.

    `memory` is of one device, `host` of one node, `disk` at the worst moment of a run that a
    signal may stop once.
    """

    parameters: int
    machine: Machine
    setting: Setting
    work: Work
    memory: Memory
    host: int
    checkpoint: int
    export: int
    disk: int
    time: Time | None

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
        """One sentence for each thing there is too little of; empty when the run fits."""
        machine = self.machine
        found = []
        if self.headroom < 0:
            found.append(_lacking("of device memory", self.memory.total, machine.device.memory))
        if machine.host is not None and self.host > machine.host and machine.device.cuda:
            found.append(_lacking("of RAM a node", self.host, machine.host))
        if machine.disk is not None and self.disk > machine.disk:
            found.append(_lacking("of disk", self.disk, machine.disk))
        return found

    @property
    def fits(self) -> bool:
        """Whether the run can be started."""
        return not self.problems

    def cost(self, price: float) -> float | None:
        """What the run costs at `price` a device and hour."""
        if self.seconds is None:
            return None
        return self.seconds / 3600 * self.machine.world_size * price

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "headroom": self.headroom,
            "fits": self.fits,
            "problems": self.problems,
        }


def _lacking(what: str, needed: int, there: int) -> str:
    return f"needs {needed / 1e9:,.1f} GB {what}, there are {there / 1e9:,.1f} GB"


def make(shape: Shape, arguments: Arguments, machine: Machine, work: Work) -> Plan:
    """Plan one run."""
    chosen = setting(shape, arguments, machine)
    runtime = plan_memory.CUDA_RUNTIME if machine.device.cuda else plan_memory.CPU_RUNTIME
    compiles = arguments.torch_compile or chosen.optimizer == plan_memory.ADAMW_8BIT
    if not machine.device.cuda and compiles:
        runtime += plan_memory.COMPILER
    memory = plan_memory.peak(shape, work.largest, chosen, runtime)
    exported = export_bytes(shape, arguments.export_dtype)
    checkpoint = checkpoint_bytes(shape, chosen)
    return Plan(
        parameters=shape.parameters,
        machine=machine,
        setting=chosen,
        work=work,
        memory=memory,
        host=host_bytes(shape, chosen, machine, memory, exported),
        checkpoint=checkpoint,
        export=exported,
        disk=disk_bytes(arguments, work, checkpoint, exported),
        time=plan_time.expected(
            shape, work, chosen, machine.device, machine.world_size, machine.nodes
        ),
    )


def setting(shape: Shape, arguments: Arguments, machine: Machine) -> Setting:
    """How the flags make the trainer use its devices."""
    device = machine.device
    special = {"hybrid_shard": machine.ranks, "no_shard": 1}
    shards = special.get(arguments.sharding, machine.world_size)
    offload = "offload" in arguments.fsdp
    # As alpaca/training/sharding.py decides it.
    whole = shape.parameters * (16 / shards + 4) <= 0.6 * device.memory
    # As alpaca/training/command.py decides it.
    half = device.fast_bf16 and (device.cuda if arguments.bf16 is None else arguments.bf16)
    return Setting(
        shards=shards,
        compute=2 if half else 4,
        optimizer=plan_memory.ADAMW_8BIT if "8bit" in arguments.optim else plan_memory.ADAMW,
        checkpointing=arguments.gradient_checkpointing,
        offload=offload,
        regather=arguments.sharding in ("full_shard", "hybrid_shard"),
        once=whole and not offload,
        cuda=device.cuda,
    )


def host_bytes(
    shape: Shape, chosen: Setting, machine: Machine, memory: Memory, exported: int
) -> int:
    """RAM of one node: its processes, what is offloaded, and a shard of the export."""
    if not machine.device.cuda:
        return machine.ranks * memory.total
    state = plan_memory.state_bytes(shape.parameters, chosen.optimizer)
    offloaded = state * machine.ranks // chosen.shards if chosen.offload else 0
    return machine.ranks * CUDA_HOST + offloaded + min(SHARD_BYTES, exported)


def checkpoint_bytes(shape: Shape, chosen: Setting) -> int:
    """Tensors of a checkpoint: fp32 weights, the optimizer's state, and its step counters."""
    state = (plan_memory.MASTER + chosen.optimizer) * shape.parameters
    return round(state) + 4 * len(shape.tensors())


def disk_bytes(arguments: Arguments, work: Work, checkpoint: int, exported: int) -> int:
    """Disk at the worst moment: while a checkpoint is written beside older ones, or the export is.

    A run writes one at its end, and those that `save_strategy` asks for before; one more where a
    signal stops it. An older one is deleted when the next is complete.
    """
    if arguments.save_strategy == "no":
        return exported
    period = {
        "steps": arguments.save_steps,
        "epoch": max(1, work.examples // work.batch),
    }[arguments.save_strategy]
    written = -(-work.steps // period) + 1
    limit = arguments.save_total_limit
    return max(min(limit + 1, written) * checkpoint, min(limit, written) * checkpoint + exported)


def export_bytes(shape: Shape, dtype: str = "bf16") -> int:
    """Size of the exported weights to the byte: safetensors files of `dtype`, and their index.

    A file is 8 bytes, a JSON header padded to a multiple of 8, and the tensors in the model's
    order (huggingface/safetensors, README, "Format").
    """
    itemsize = EXPORT_SIZES[dtype]
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, dimensions in shape.tensors().items():
        size = itemsize * math.prod(dimensions)
        if held and held + size > SHARD_BYTES:
            files.append({})
            held = 0
        files[-1][name] = dimensions
        held += size
    total = sum(_file_bytes(tensors, dtype) for tensors in files)
    return total if len(files) == 1 else total + _index_bytes(files, total)


def _file_bytes(tensors: dict[str, tuple[int, ...]], dtype: str) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dimensions in tensors.items():
        end = at + EXPORT_SIZES[dtype] * math.prod(dimensions)
        header[name] = {
            "dtype": dtype.upper().replace("FP", "F"),
            "shape": dimensions,
            "data_offsets": [at, end],
        }
        at = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + at


def _index_bytes(files: list[dict[str, tuple[int, ...]]], total: int) -> int:
    names = {
        name: f"model-{number:05}-of-{len(files):05}.safetensors"
        for number, tensors in enumerate(files, start=1)
        for name in tensors
    }
    return len(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1))
