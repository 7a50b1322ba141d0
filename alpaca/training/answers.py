"""Greedy answers of the model in training, which `--eval_generations` logs at each evaluation.

The sharded model computes the whole sequences again for each token, without a key-value cache:
slow, but it needs no more memory than a training step, and no other attention than training's.
Sequences are packed, so there is no padding. The ranks divide the prompts; each forward pass is a
collective call, so all ranks run the same number, also those that have no prompt left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from alpaca.tokens import Codec
from alpaca.training import loss
from alpaca.training.inputs import Task
from alpaca.training.rendezvous import on_every_rank


@dataclass(frozen=True)
class Samples:
    """Tasks to answer at each evaluation, with at most `limit` tokens each."""

    tasks: Sequence[Task]
    codec: Codec
    limit: int

    @property
    def prompts(self) -> list[list[int]]:
        """The ids of each task's prompt."""
        return [task.prompt for task in self.tasks]

    def line(self, step: int, answers: Sequence[list[int]]) -> dict[str, Any]:
        """The log line with the answers' texts."""
        found = [
            {"prompt": task.text, "answer": continued(self.codec, task.prompt, answer)}
            for task, answer in zip(self.tasks, answers, strict=True)
        ]
        return {"step": step, "samples": found}


def continued(codec: Codec, prompt: list[int], answer: list[int]) -> str:
    """The text of an answer; decoded after its prompt, because alone it may lose a space."""
    return codec.decode([*prompt, *answer])[len(codec.decode(prompt)) :]


@torch.no_grad()
def greedy(
    module: torch.nn.Module,
    prompts: Sequence[list[int]],
    eos: int,
    limit: int,
    capacity: int,
    device: torch.device,
) -> list[list[int]]:
    """Up to `limit` greedy tokens after each prompt, without EOS; a collective call.

    At most `capacity` tokens are in one forward pass, unless one sequence alone is longer.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    longest = [len(prompt) + limit for prompt in prompts]
    own: dict[int, list[int]] = {}
    with torch.compiler.set_stance("force_eager"):  # each length occurs only once
        for members in packs(longest, capacity, ranks)[rank::ranks]:
            made = _continue(module, [prompts[i] for i in members], eos, limit, device)
            own |= dict(zip(members, made, strict=True))
    every = {i: made for part in on_every_rank(lambda: own) for i, made in part.items()}
    return [every[i] for i in range(len(prompts))]


def packs(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[int]]:
    """Indices of the sequences of each pack, a whole number of packs for each rank.

    Few sequences are spread over the ranks; packs without any are for ranks that only join in.
    """
    most = -(-len(lengths) // ranks)
    found: list[list[int]] = []
    filled = 0
    for i, length in enumerate(lengths):
        if not found or len(found[-1]) == most or filled + length > capacity:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += length
    return found + [[] for _ in range(-len(found) % ranks)]


def _continue(
    module: torch.nn.Module,
    prompts: Sequence[list[int]],
    eos: int,
    limit: int,
    device: torch.device,
) -> list[list[int]]:
    """The answers of one pack; all ranks end together, when each has its answers complete."""
    made: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(limit):
        sequences = [[*prompts[i], *made[i]] for i in unfinished]
        tokens = loss.likeliest(module, sequences or [[eos]], device)
        pairs = zip(unfinished, tokens, strict=False)  # a rank without a sequence has a token
        going = [(i, token) for i, token in pairs if token != eos]
        for i, token in going:
            made[i].append(token)
        unfinished = [i for i, _ in going]
        left = torch.tensor(len(unfinished), device=device)
        dist.all_reduce(left)
        if not left.item():
            break
    return made
