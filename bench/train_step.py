"""One optimizer step three ways: padded as in 2023, packed, packed with a shared prefix.

    python bench/train_step.py --data alpaca_data.json [--model DIR] [--examples 32]

fp32, forward and backward (the optimizer's part is the same in all three). The padded way is
plain transformers: batches of 4, right-padded, loss on the answer tokens. Each round runs the three
in turn, so that drifts of the machine's speed affect all of them. Last line: JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from alpaca.folder import load_tokenizer
from alpaca.recipe import packing
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import attention, flops, loss
from alpaca.training.loss import TargetLoss

CPU = torch.device("cpu")
BATCH, LENGTH = 4, 512


def padded(
    model: PreTrainedModel, corpus: Corpus, members: list[int], targets: int, *, exact: bool = False
) -> None:
    """Forward and backward as the scripts of 2023 did it; `exact`: the loss in fp64.

    torch's fp32 cross_entropy over 49,152 logits causes an error of 1e-4 in the gradient (measured
    against fp64 throughout). That is more than all other errors together, so gradients are compared
    without it.
    """
    for start in range(0, len(members), BATCH):
        batch = members[start : start + BATCH]
        examples = [torch.tensor(corpus.example(i)).long() for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(e) for e in examples], True)
        labels = ids.masked_fill(mask == 0, -100)
        for row, i in enumerate(batch):
            labels[row, : int(corpus.prompt_lengths[i])] = -100
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        total = F.cross_entropy(
            logits.flatten(0, 1).to(torch.float64 if exact else logits.dtype),
            labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        (total / targets).backward()


def packed(
    module: TargetLoss,
    corpus: Corpus,
    members: list[int],
    targets: int,
    capacity: int = BATCH * LENGTH,
) -> None:
    """Forward and backward over packs of at most `capacity` tokens."""
    for pack in packing.distribute(corpus, members, capacity, world_size=1)[0]:
        (loss.pack_loss(module, packing.build(corpus, pack), CPU) / targets).backward()


def timed(body: Callable[[], None], model: torch.nn.Module) -> tuple[float, torch.Tensor]:
    """Seconds of one step, and its gradient as one vector."""
    model.zero_grad()
    started = time.perf_counter()
    body()
    seconds = time.perf_counter() - started
    return seconds, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def lasting_rate(size: int = 1024, seconds: float = 3.0) -> float:
    """Sustained FLOP/s of fp32 matrix products, over seconds, as in a step.

    The best of a few products is 15 to 40% faster on a virtual machine, but no step sustains that.
    """
    one, other = torch.randn(2, size, size)
    torch.mm(one, other)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(one, other)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def options(description: str) -> argparse.ArgumentParser:
    """The flags of a benchmark of this step."""
    options = argparse.ArgumentParser(description=description.partition("\n")[0])
    options.add_argument("--data", type=Path, default=Path("data/seed_tasks.jsonl"))
    options.add_argument("--model", type=Path, default=Path("weights/smollm2-135m"))
    options.add_argument("--examples", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    return options


def main() -> None:
    arguments = options(__doc__).parse_args()
    codec = Codec(load_tokenizer(arguments.model))
    with tempfile.TemporaryDirectory() as cache:
        corpus = open_corpus(arguments.data, codec, Path(cache), LENGTH)
        report(arguments, corpus)


def report(arguments: argparse.Namespace, corpus: Corpus) -> None:
    members = list(range(min(arguments.examples, len(corpus))))
    targets = sum(corpus.targets(i) for i in members)
    alone = replace(corpus, prefix_lengths=(0, 0))

    def load(how: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation=how
        ).train()

    plain, module = load("sdpa"), TargetLoss(load(attention.NAME))
    ways: dict[str, tuple[Callable[[], None], torch.nn.Module]] = {
        "padded": (lambda: padded(plain, corpus, members, targets), plain),
        "packed": (lambda: packed(module, alone, members, targets), module),
        "shared": (lambda: packed(module, corpus, members, targets), module),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    fractions, gradients = [], {}
    work = flops.ModelFlops.of(plain)
    shares = packing.distribute(corpus, members, BATCH * LENGTH, world_size=1)[0]
    useful = sum(work.of_pack(packing.build(corpus, share)) for share in shares)
    for round_number in range(arguments.rounds):
        rate = lasting_rate()
        for name, (body, model) in ways.items():
            spent, gradients[name] = timed(body, model)
            seconds[name].append(spent)
            print(f"round {round_number + 1}: {name} {spent:.2f} s", flush=True)
        rate = (rate + lasting_rate()) / 2
        fractions.append(useful / seconds["shared"][-1] / rate)
    _, exact = timed(lambda: padded(plain, corpus, members, targets, exact=True), plain)

    def difference(way: str) -> float:
        return float((gradients[way] - exact).norm() / exact.norm())

    def ratio(way: str) -> float:
        pairs = zip(seconds["padded"], seconds[way], strict=True)
        return round(statistics.median(one / other for one, other in pairs), 3)

    result = {
        "speedup_vs_padded": ratio("shared"),
        "speedup_packed_only": ratio("packed"),
        "grad_rel_diff": difference("shared"),
        "grad_rel_diff_of_padded_fp32_loss": difference("padded"),
        "fraction_of_matmul_rate": round(statistics.median(fractions), 3),
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "examples": len(members),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
