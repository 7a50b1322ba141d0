"""One optimizer step in this trainer, in TRL's SFTTrainer and in transformers' Trainer.

    python bench/peers.py --data alpaca_data.json [--model DIR] [--examples 32] [--rounds 3]

All run the same examples, already tokenized, in fp32, forward and backward, without the optimizer.
Both libraries run in .venvs/peers (made on the first run). First, each of their ways to train runs
once; a way whose gradient differs from ours by at most 5e-4 counts as exact. Then our step and the
fastest exact way of each library run in turn. Last line: JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from train_step import LENGTH, options, packed, timed
from transformers import AutoModelForCausalLM

from alpaca.folder import load_tokenizer
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import attention
from alpaca.training.loss import TargetLoss

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venvs" / "peers"
PACKAGES = [
    "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "trl==1.16.0",
    "peft==0.21.2",
]  # fmt: skip
# torch's cross_entropy, in the libraries' steps, is off by 1.7e-4 in the gradient of 49,152 logits.
EXACT = 5e-4


def environment() -> Path:
    """The Python that has both libraries; its packages are installed where they are missing."""
    python = PEERS / "bin" / "python"
    ready = PEERS / "ready"
    if not ready.exists() or ready.read_text() != " ".join(PACKAGES):
        print(f"installing {', '.join(PACKAGES)} into {PEERS}", flush=True)
        venv.create(PEERS, with_pip=True, clear=True)
        quiet = ["-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([python, *quiet, *PACKAGES], check=True)
        ready.write_text(" ".join(PACKAGES))
    return python


@dataclass
class Peers:
    """The process in which the other libraries train."""

    process: "subprocess.Popen[str]"
    log: Path
    ways: list[str]
    versions: dict[str, str]

    @classmethod
    def start(cls, model: Path, work: Path, *, adapter: Path | None = None) -> "Peers":
        """Load the model there, with the examples and the gradient that are stored in `work`.

        With an adapter's folder, only the adapter is trained.
        """
        command = [environment(), ROOT / "bench/peers_worker.py", model.resolve(), work]
        log = work / "log"
        with open(log, "w") as errors:
            process = subprocess.Popen(
                [*map(str, command), str(torch.get_num_threads()), *([adapter] if adapter else [])],
                cwd=work,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        peers = cls(process, log, [], {})
        hello = peers.answer()
        peers.ways, peers.versions = hello["ways"], hello["versions"]
        return peers

    def step(self, way: str) -> dict[str, Any]:
        """Seconds and gradient difference of one step, or the error."""
        assert self.process.stdin is not None
        print(way, file=self.process.stdin, flush=True)
        return self.answer()

    def try_all(self, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """One step of each way, or of some."""
        trials = {}
        for way in only or self.ways:
            trials[way] = self.step(way)
            print(f"{way}: {trials[way]}", flush=True)
        return trials

    def answer(self) -> dict[str, Any]:
        """The next line it writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"peers: the other process ended:\n{self.log.read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    arguments = options(__doc__).parse_args()
    codec = Codec(load_tokenizer(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(arguments.data, codec, Path(folder), LENGTH)
        report(arguments, corpus, Path(folder))


def report(arguments: argparse.Namespace, corpus: Corpus, work: Path) -> None:
    members = list(range(min(arguments.examples, len(corpus))))
    targets = sum(corpus.targets(i) for i in members)
    loaded = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation=attention.NAME
    )
    module = TargetLoss(loaded.train())

    def ours() -> float:
        return timed(lambda: packed(module, corpus, members, targets), module)[0]

    print(f"ours, once: {ours():.2f} s", flush=True)
    gradients = {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}
    save_file(gradients, work / "gradient.safetensors")
    (work / "examples.json").write_text(json.dumps([example(corpus, i) for i in members]))
    peers = Peers.start(arguments.model, work)
    try:
        trials = peers.try_all()
        best = {name: fastest(name, trials) for name in ("sfttrainer", "trainer")}
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", *best)}
        for number in range(1, arguments.rounds + 1):
            seconds["ours"].append(ours())
            for name, way in best.items():
                seconds[name].append(peers.step(way)["seconds"])
            print(f"round {number}:", {k: round(v[-1], 2) for k, v in seconds.items()}, flush=True)
    finally:
        peers.process.kill()
    print(json.dumps(summary(peers, trials, best, seconds, len(members))))


def summary(
    peers: Peers,
    trials: dict[str, Any],
    best: dict[str, str],
    seconds: dict[str, list[float]],
    examples: int,
) -> dict[str, Any]:
    """What was measured, for the last line."""
    result: dict[str, Any] = {
        f"speedup_vs_{name}": ratio(seconds[name], seconds["ours"]) for name in best
    }
    result |= {f"{name}_setting": way for name, way in best.items()}
    result["seconds"] = {name: round(statistics.median(v), 2) for name, v in seconds.items()}
    result |= {"trials": trials, "examples": examples, "threads": torch.get_num_threads()}
    result["versions"] = {"python": sys.version.split()[0], **peers.versions}
    return result


def example(corpus: Corpus, index: int) -> dict[str, list[int]]:
    """One example as both libraries take it: ids, and which of them are trained on."""
    ids = [int(i) for i in corpus.example(index)]
    prompt = int(corpus.prompt_lengths[index])
    return {
        "input_ids": ids,
        "completion_mask": [0] * prompt + [1] * (len(ids) - prompt),
        "labels": [-100] * prompt + ids[prompt:],
    }


def fastest(library: str, trials: dict[str, dict[str, Any]]) -> str:
    """The fastest of a library's ways whose gradient is exact."""
    exact = {
        way: trial["seconds"]
        for way, trial in trials.items()
        if way.startswith(library) and trial.get("difference", 1.0) <= EXACT
    }
    if not exact:
        raise SystemExit(f"peers: no way of {library} gives the step's gradient")
    return min(exact, key=lambda way: exact[way])


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of their time divided by ours."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


if __name__ == "__main__":
    main()
