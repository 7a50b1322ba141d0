"""What a run tells: the progress bar, `log.jsonl`, and what is said before and after.

Only rank 0 speaks.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from tqdm import tqdm

from alpaca import atomic
from alpaca.training.corpus import Corpus


class Journal:
    """The log and the progress bar of a run; a resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, steps: int, done: int) -> None:
        """`done` of `steps` steps are behind; what the log says of later ones is dropped."""
        self.main = dist.get_rank() == 0
        self.path = folder / "log.jsonl"
        self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not self.main)
        if self.main:
            earlier = self.path.read_text().splitlines() if done and self.path.exists() else []
            kept = [line for line in earlier if json.loads(line)["step"] <= done]
            atomic.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def __enter__(self) -> Self:
        """Use it as a context: the bar is closed whatever happens."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close the bar."""
        self.bar.close()

    def step(self, line: dict[str, Any], *, write: bool) -> None:
        """Show a step, and write its line."""
        if write:
            self.write(line)
        self.bar.set_postfix(
            loss=f"{line['loss']:.4f}", tok_s=f"{line['tokens_per_second']:.0f}", refresh=False
        )
        self.bar.update()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to the log."""
        if self.main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def draw(folder: Path) -> None:
    """Draw the log's losses as `loss.png` and `loss.svg` in the output folder."""
    # Here, not above: the figure is drawn once, and importing its library takes a second.
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("loss", "training, one step", "-"),
        ("eval_loss", "held out", "o-"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    for name in ("loss.png", "loss.svg"):
        figure.savefig(folder / name, dpi=120)


def show_example(corpus: Corpus, index: int, decode: Any, limit: int) -> str:
    """One example as the model sees it: the masked prompt, then each trained token in brackets."""
    ids = [int(i) for i in corpus.example(index)]
    prompt = int(corpus.prompt_lengths[index])
    trained = "".join(f"[{decode([i])}]" for i in ids[prompt:])
    cut = " (cut off here)" if len(ids) == limit else ""
    shared = corpus.prefix_lengths[int(corpus.kinds[index])]
    return (
        f"masked ({prompt} tokens, the first {shared} shared within a pack):\n"
        f"{decode(ids[:prompt])}\ntrained ({len(ids) - prompt} tokens):\n{trained}{cut}"
    )
