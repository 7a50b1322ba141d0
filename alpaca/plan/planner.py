"""A plan for this command line on this machine: finds the model, the data and the devices.

`train.py` plans first: `check` refuses a run that cannot fit. After training, `report.compare`
lists predicted and measured figures. torch is imported only if a data set has to be tokenized, so
a plan is usually fast.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alpaca import atomic, ram
from alpaca.errors import UserError
from alpaca.pairs import read_pairs
from alpaca.passport import sha256
from alpaca.plan import plan, remedies, shapes, workload
from alpaca.plan.devices import Device, cpu
from alpaca.plan.plan import Machine, Plan
from alpaca.plan.remedies import Remedy
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import Workload
from alpaca.prompt import template_hash
from alpaca.recipe import steps
from alpaca.recipe.arguments import ADAPTER_RATE, Arguments
from alpaca.recipe.corpus import FORMAT, Corpus, load, no_targets_left, split
from alpaca.records import read_records

CACHE = Path(".cache/alpaca")
ADAPTED = (
    "trains an adapter in place of all weights; --learning_rate is then "
    f"{ADAPTER_RATE:g} by default"
)
SAMPLE = 5_000  # examples placed for each other size of pack: enough to compare remedies


@dataclass(frozen=True)
class Case:
    """What is to be planned: a model, flags and data on a machine."""

    shape: Shape
    arguments: Arguments
    machine: Machine
    corpus: Corpus
    train: Sequence[int]
    exact: bool

    def count(self, arguments: Arguments, most: int = SAMPLE) -> Workload:
        """The work under other flags."""
        ranks = self.machine.world_size
        schedule = steps.schedule(arguments, len(self.train), ranks)
        return workload.count(
            self.corpus, self.train, schedule, arguments, ranks, exact=self.exact, most=most
        )

    def plan(self) -> Plan:
        """The plan of this run."""
        work = self.count(self.arguments, workload.MOST_PLACED)
        return plan.make(self.shape, self.arguments, self.machine, work)

    def remedies(self) -> list[Remedy]:
        """What would make it fit."""
        return remedies.remedies(self.shape, self.arguments, self.machine, self.count)

    def enough_nodes(self) -> int | None:
        """How many such nodes would be enough, where no flag helps."""
        return remedies.enough_nodes(self.shape, self.arguments, self.machine, self.count)


def case(arguments: Arguments, machine: Machine, examples: int = 0) -> Case:
    """Find the model and the data of a command line; `examples`: estimate a set of that size.

    Raises:
        UserError: the model or the data can't be planned.
    """
    shape = shapes.find(arguments.model_name_or_path)
    tokenizer = arguments.tokenizer_name_or_path or arguments.model_name_or_path
    exact = (tokenizer / "tokenizer.json").is_file() and not examples
    if exact:
        corpus = _tokens(arguments, tokenizer, CACHE)
    else:
        read = read_pairs if arguments.loss == "dpo" else read_records
        corpus = workload.estimated(read(arguments.data_path), arguments, examples)
    train, _ = split(corpus, arguments.eval_fraction, arguments.seed)
    if not train:
        raise no_targets_left(arguments.data_path, arguments.model_max_length)
    return Case(shape, arguments, machine, corpus, train, exact)


def _tokens(arguments: Arguments, tokenizer: Path, cache: Path) -> Corpus:
    """The tokenized data set; a note file names its folder, to spare later plans the tokenizer."""
    if not arguments.data_path.is_file():
        read_records(arguments.data_path)  # explains what is wrong
    pairs = arguments.loss == "dpo"
    described = [tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json")]
    parts = [
        FORMAT,
        sha256(arguments.data_path),
        [sha256(path) for path in described if path.is_file()],
        template_hash(),
        arguments.model_max_length,
        arguments.joint_tokenization,
        *(["pairs"] if pairs else []),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    note = cache / f"plan-{key}.txt"
    if note.is_file() and (cache / note.read_text()).is_dir():
        return load(cache / note.read_text())
    # Only now: importing transformers takes longer than the rest of a plan.
    from alpaca.folder import load_tokenizer
    from alpaca.recipe.corpus import open_corpus, tokens_folder
    from alpaca.tokens import Codec

    codec = Codec(load_tokenizer(tokenizer))
    limit, joint = arguments.model_max_length, arguments.joint_tokenization
    data = arguments.data_path
    corpus = open_corpus(data, codec, cache, limit, joint=joint, pairs=pairs)
    folder = tokens_folder(data, codec, cache, limit, joint=joint, pairs=pairs)
    atomic.write_text(note, folder.name)
    return corpus


def this_machine(
    output: Path, devices: Sequence[Device], ranks: int = 0, nodes: int = 1
) -> Machine:
    """This machine: its smallest card, or its processor shared by `ranks` processes."""
    host = ram.total()
    disk = atomic.free_disk(output.resolve()) + replaced(output)
    if devices:
        smallest = min(devices, key=lambda device: device.memory)
        return Machine(smallest, ranks or len(devices), nodes, host, disk)
    ranks = ranks or 1
    shared = cpu(host // ranks)
    return Machine(shared, ranks, nodes, host, disk)


def replaced(output: Path) -> int:
    """Bytes in `output` that the run will delete: earlier checkpoints and unfinished writes."""
    kinds = ("checkpoint-*/**/*", ".checkpoint-*/**/*", ".model.partial/**/*")
    paths = (path for kind in kinds for path in output.glob(kind))
    return sum(path.stat().st_size for path in paths if path.is_file())


def launched(output: Path, devices: Sequence[Device]) -> Machine:
    """The machine as torchrun describes it to its ranks."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return this_machine(output, devices, local, world // local)


def of_run(
    arguments: Arguments,
    corpus: Corpus,
    train: Sequence[int],
    devices: Sequence[Device],
    *,
    half: bool,
) -> Case | None:
    """The case of a run that torchrun has started; None, with a notice, where it can't be planned.

    `devices`: the cards torch sees, in its order; empty on a CPU. `half`: the run uses bf16.
    """
    try:
        shape = shapes.find(arguments.model_name_or_path)
    except UserError as error:
        print(f"train: not planned: {error.happened}", flush=True)
        return None
    machine = launched(arguments.output_dir, devices)
    machine = replace(machine, device=replace(machine.device, fast_bf16=half))
    return Case(shape, replace(arguments, bf16=half), machine, corpus, train, exact=True)


def more_devices(given: Case) -> str:
    """A sentence on the hardware that would be enough, where no flag helps."""
    nodes = given.enough_nodes()
    if nodes is None:
        return "It needs a larger machine, or a smaller model."
    one = given.machine
    return (
        f"{nodes} nodes of {one.ranks} such devices are enough with --gradient_checkpointing True "
        f"--max_tokens_per_pack {given.arguments.longest_example}."
    )


def check(given: Case) -> Plan:
    """The plan of a run that is about to start; its caller skips this with `--skip_plan`.

    Raises:
        UserError: the run cannot fit; the message says by how much, and which flags help.
    """
    made = given.plan()
    if made.fits:
        return made
    helpful = [
        f"{remedy.flags}" + (f"   ({ADAPTED})" if remedy.adapts else "")
        for remedy in given.remedies()
    ]
    raise UserError(
        f"This run cannot fit: it {'; and '.join(made.problems)}.",
        (
            "Any of these makes it fit:\n    " + "\n    ".join(helpful)
            if helpful
            else f"No flag makes it fit. {more_devices(given)}"
        )
        + "\n  --skip_plan starts it anyway.",
    )
