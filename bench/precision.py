"""What a recipe learns in fp32 and in bf16, as the held-out loss of the saved model.

    python bench/precision.py --data alpaca_data.json --results bench/precision.jsonl
    python bench/precision.py --data alpaca_data.json --time 5      # seconds a step instead

For each learning rate and number of steps, the same examples in the same order five ways:

    fp32      masters and computing in fp32; also its export, to the nearest and stochastic
    plain     fp32 masters, computing in bf16
    dithered  the same, masters dithered (train.py's default)
    pure      weights, moments and computing in bf16
    sft       TRL's SFTTrainer, bf16=True: fp32 masters under autocast

Two more ways help to decide what to dither: `matrices` does not dither norms, and `layers` does not
dither embeddings either.

The result of a way is the share of fp32's decrease in held-out loss, each measured from the base in
the type that the way computes in. Finished cells are kept in --results and not run again. On a CPU
without bf16 instructions, products of bf16 numbers are computed in fp32 and rounded once. Last
line: JSON.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bf16_products import products
from matplotlib.figure import Figure
from peers import ROOT, environment
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from alpaca import rounding
from alpaca.folder import load_tokenizer
from alpaca.recipe import steps
from alpaca.recipe.arguments import Arguments
from alpaca.recipe.corpus import Corpus, open_corpus, split
from alpaca.tokens import Codec
from alpaca.training import attention, sharding
from alpaca.training.inputs import Data
from alpaca.training.loop import Trainer
from alpaca.training.loss import TargetLoss
from alpaca.training.weights import Dither

CPU = torch.device("cpu")
WAYS = ("fp32", "plain", "dithered", "pure", "sft")
DITHERED = ("dithered", "matrices", "layers")
BF16 = torch.bfloat16


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--model", type=Path, default=Path("weights/smollm2-135m"))
    options.add_argument("--data", type=Path, default=Path("data/seed_tasks.jsonl"))
    options.add_argument("--results", type=Path, default=Path("bench/precision.jsonl"))
    options.add_argument("--rates", default="1e-4,2e-5,5e-6,1e-6")
    options.add_argument("--steps", default="12,50,200")
    options.add_argument("--ways", default=",".join(WAYS))
    options.add_argument("--batch", type=int, default=8, help="examples a step")
    options.add_argument("--held_out", type=int, default=0, help="0: all of the 15%%")
    options.add_argument("--max_length", type=int, default=512)
    options.add_argument("--write", action="store_true", help="put the results into docs/ instead")
    options.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="time steps instead")
    return options.parse_args()


class Bench:
    """The data, and the runs of the table's cells."""

    def __init__(self, options: argparse.Namespace, corpus: Corpus, mesh: DeviceMesh) -> None:
        """Hold 15% of the corpus out."""
        self.options = options
        self.mesh = mesh
        train, held_out = split(corpus, 0.15, 42)
        held_out = held_out[: options.held_out] if options.held_out else held_out
        self.data = Data(corpus, train, corpus, held_out)

    @property
    def setting(self) -> dict[str, Any]:
        """The settings that cells must share to be comparable."""
        options = self.options
        return {
            "model": options.model.name,
            "data": options.data.name,
            "batch": options.batch,
            "held_out": len(self.data.held_out),
            "max_length": options.max_length,
        }

    def arguments(self, rate: float, count: int, **more: Any) -> Arguments:
        """The flags of a run."""
        return Arguments(
            model_name_or_path=self.options.model,
            learning_rate=rate,
            max_steps=count,
            per_device_train_batch_size=self.options.batch,
            gradient_accumulation_steps=1,
            model_max_length=self.options.max_length,
            **more,
        )

    def trainer(self, way: str, rate: float, count: int) -> Trainer:
        """A trainer before its first step."""
        arguments = self.arguments(rate, count, dither_masters=way in DITHERED)
        compute = torch.float32 if way == "fp32" else BF16
        if way == "pure":
            loaded = AutoModelForCausalLM.from_pretrained(
                self.options.model, dtype=BF16, attn_implementation=attention.NAME
            )
            module = TargetLoss(loaded.train())
        else:
            folder = self.options.model
            dither = Dither.of(arguments, compute)
            module = sharding.build(folder, self.mesh, compute, CPU, arguments, dither)
        if way in ("matrices", "layers"):
            keep_base(module, self.options.model, embeddings=way == "layers")
        schedule = steps.schedule(arguments, len(self.data.train), 1)
        return Trainer(
            arguments,
            module,
            self.data,
            schedule,
            CPU,
            compute,
            {},
            reduces_once=way != "pure",
        )

    def cell(self, way: str, rate: float, count: int) -> dict[str, Any]:
        """Train one way and measure the saved model."""
        started = time.monotonic()
        with products():
            if way == "sft":
                losses = self.sft(rate, count)
            else:
                losses = self.ours(self.trainer(way, rate, count), way, count)
        spent = round(time.monotonic() - started)
        return {"way": way, "rate": rate, "steps": count, **losses, "seconds": spent}

    def ours(self, trainer: Trainer, way: str, count: int) -> dict[str, float | None]:
        """Held-out losses before and after our own steps."""
        losses = {"before": held_out_loss(trainer)}
        for step in range(count):
            trainer.step(step)
        losses["after"] = held_out_loss(trainer)
        if way == "fp32":
            masters = [p.detach().clone() for p in trainer.module.parameters()]
            for how in ("nearest", "stochastic"):
                put_exported(trainer.module, masters, how)
                losses[how] = held_out_loss(trainer)
        return losses

    def sft(self, rate: float, count: int) -> dict[str, float | None]:
        """SFTTrainer's masters, measured in our bf16 forward pass as the other ways are."""
        trainer = self.trainer("plain", rate, count)
        losses = {"before": held_out_loss(trainer)}
        corpus, train = self.data.corpus, self.data.train
        order = [train[i] for step in range(count) for i in trainer.schedule.indices(step)]
        with tempfile.TemporaryDirectory() as work:
            examples = [example(corpus, i) for i in order]
            (Path(work) / "examples.json").write_text(json.dumps(examples))
            command = [
                environment(),
                ROOT / "bench/precision_worker.py",
                self.options.model.resolve(),
                work,
                rate,
                count,
                self.options.batch,
                trainer.schedule.warmup,
                torch.get_num_threads(),
            ]
            subprocess.run(list(map(str, command)), check=True, cwd=work)
            trained = load_file(Path(work) / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in trainer.module.model.named_parameters():
                parameter.to_local().copy_(trained[name])  # type: ignore[attr-defined]
        losses["after"] = held_out_loss(trainer)
        return losses


def held_out_loss(trainer: Trainer) -> float | None:
    means = trainer.held_out_means()
    return means[0] if means else None


def keep_base(module: TargetLoss, folder: Path, *, embeddings: bool) -> None:
    """Undo the dither of norms and biases, and, if `embeddings`, of embeddings and a tied head."""
    base = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if parameter.ndim == 1 or (embeddings and "embed" in name):
                parameter.to_local().copy_(base[name])  # type: ignore[attr-defined]


def put_exported(module: TargetLoss, masters: list[torch.Tensor], how: str) -> None:
    """Give the model the weights that a bf16 export of `masters` would hold."""
    with torch.no_grad():
        for (name, parameter), master in zip(module.named_parameters(), masters, strict=True):
            whole = master.full_tensor()  # type: ignore[attr-defined]
            rounded = rounding.stochastic(whole, BF16, 42, name) if how == "stochastic" else whole
            parameter.to_local().copy_(rounded.to(BF16))  # type: ignore[attr-defined]


def example(corpus: Corpus, index: int) -> dict[str, list[int]]:
    """One example as SFTTrainer takes it."""
    ids = [int(i) for i in corpus.example(index)]
    prompt = int(corpus.prompt_lengths[index])
    return {"input_ids": ids, "completion_mask": [0] * prompt + [1] * (len(ids) - prompt)}


def times(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds of a bf16 step with dithered and with plain masters, and of counting changes."""
    trainers = {way: bench.trainer(way, 2e-5, rounds + 1) for way in ("plain", "dithered")}
    spent: dict[str, list[float]] = {way: [] for way in trainers}
    counting = []
    for step in range(rounds + 1):
        for way, trainer in trainers.items():
            started = time.perf_counter()
            with products():
                trainer.step(step)
            if step:  # the first allocates
                spent[way].append(time.perf_counter() - started)
            started = time.perf_counter()
            trainer.sample.count()
            counting.append(time.perf_counter() - started)
        print({way: round(s[-1], 3) for way, s in spent.items() if s}, flush=True)
    pairs = zip(spent["dithered"], spent["plain"], strict=True)
    return {
        "dithered_vs_plain": round(statistics.median(one / other for one, other in pairs), 4),
        "counting_vs_step": round(
            statistics.median(counting) / statistics.median(spent["plain"]), 5
        ),
        "seconds": {way: round(statistics.median(s), 3) for way, s in spent.items()},
    }


def shares(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way's share of fp32's decrease, one row for each learning rate and number of steps."""
    rows = []
    for rate, count in sorted({(c["rate"], c["steps"]) for c in cells}, reverse=True):
        found = {c["way"]: c for c in cells if (c["rate"], c["steps"]) == (rate, count)}
        if "fp32" not in found:
            continue
        base = found["fp32"]
        whole = base["before"] - base["after"]
        row: dict[str, Any] = {"rate": rate, "steps": count, "fp32_decrease": round(whole, 5)}
        for how in ("nearest", "stochastic"):
            row[f"fp32_export_{how}"] = round((base["before"] - base[how]) / whole, 3)
        for way in (*WAYS[1:], *DITHERED[1:]):
            if way in found:
                row[way] = round((found[way]["before"] - found[way]["after"]) / whole, 3)
        rows.append(row)
    return rows


COLUMNS = {
    "plain": "bf16, plain masters",
    "dithered": "bf16, dithered masters",
    "pure": "pure bf16",
    "sft": "SFTTrainer, bf16",
    "fp32_export_nearest": "fp32, exported to the nearest bf16",
    "fp32_export_stochastic": "fp32, stochastic rounding",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The shares as a table of docs/precision.md."""
    heads = ["learning rate", "steps", "fp32's decrease", *COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [f"{row['rate']:g}", str(row["steps"]), f"{row['fp32_decrease']:.4f}"]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the shares over the learning rate, with a panel for each number of steps."""
    counts = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(4.5 * len(counts), 3.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for name, label in COLUMNS.items():
            points = sorted((r["rate"], r[name]) for r in rows if r["steps"] == count and name in r)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="learning rate", title=f"{count} steps", ylim=(-0.2, 1.3))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of fp32's decrease in held-out loss")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def write(cells: list[dict[str, Any]]) -> None:
    """Write the table and the plot into docs/."""
    rows = shares(cells)
    page = ROOT / "docs/precision.md"
    start, end = "<!-- precision: begin -->\n", "<!-- precision: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{start}{table(rows)}\n{end}{after}", encoding="utf-8")
    draw(rows, ROOT / "docs/precision.svg")


def missing(options: argparse.Namespace, cells: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """The cells that are still to be run, short runs first."""
    done = {(c["way"], c["rate"], c["steps"]) for c in cells}
    for count in map(int, options.steps.split(",")):
        for rate in map(float, options.rates.split(",")):
            for way in options.ways.split(","):
                if (way, rate, count) not in done:
                    yield way, rate, count


def main() -> None:
    options = parse()
    codec = Codec(load_tokenizer(options.model))
    mesh = sharding.start(CPU)
    with tempfile.TemporaryDirectory() as cache:
        corpus = open_corpus(options.data, codec, Path(cache), options.max_length)
        bench = Bench(options, corpus, mesh)
        if options.time:
            print(json.dumps(times(bench, options.time)))
            return
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        cells = [c for c in map(json.loads, lines) if c["setting"] == bench.setting]
        if options.write:
            write(cells)
            return
        for way, rate, count in missing(options, cells):
            cell = {**bench.cell(way, rate, count), "setting": bench.setting}
            cells.append(cell)
            with open(options.results, "a") as file:
                print(json.dumps(cell), file=file)
            print({k: v for k, v in cell.items() if k != "setting"}, flush=True)
    for row in shares(cells):
        print(row)
    print(json.dumps({"setting": bench.setting, "rows": shares(cells)}))


if __name__ == "__main__":
    main()
