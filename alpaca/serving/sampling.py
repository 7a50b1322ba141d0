"""From logits to tokens, for all requests of a step at once, each with its own settings and seed.

Order and meaning are those of transformers' generation: repetition penalty over prompt and answer
(Keskar et al. 2019), temperature, top-k (ties are kept), top-p (the smallest set of likeliest
tokens whose probability reaches p, never empty). A token is drawn by inverting the cumulative
distribution at one uniform number per token, which comes from the request's own generator, so the
draw does not depend on what else is being served.
"""

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F

from alpaca.serving.request import Sampling
from alpaca.serving.transfer import send

COLDEST = 1e-30
BLOCK = 256  # tokens
NO_TOKEN = -1
CANDIDATES = 256  # enough for nearly every nucleus, and 20 times cheaper than a full sort


def generator(seed: int, index: int) -> numpy.random.Generator:
    """The random numbers of completion `index` of a request: Philox keyed by both."""
    return numpy.random.Generator(numpy.random.Philox(numpy.random.SeedSequence([seed, index])))


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty.

    logits (rows, vocabulary), seen the same in bool, penalty (rows, 1).
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


class Draws:
    """How each row of a step's logits becomes a token; sent ahead of the pass that computes them.

    `sampled` are the rows that are not greedy; `limited` and `nucleus` those among them, counted
    from 0, which have a top_k and a top_p. `slots` are the rows of `seen` (see `choose`).
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        uniforms: Sequence[float],
        vocabulary: int,
        device: torch.device,
        slots: Sequence[int] = (),
    ) -> None:
        """One of `settings` and a number in [0, 1) for each row."""
        rows = [row for row, one in enumerate(settings) if one.temperature > 0]
        drawn = [settings[row] for row in rows]
        limited = [at for at, one in enumerate(drawn) if 0 < one.top_k < vocabulary]
        nucleus = [at for at, one in enumerate(drawn) if one.top_p < 1]
        self.penalized = any(one.repetition_penalty != 1 for one in settings)
        self.most = max((drawn[at].top_k for at in limited), default=0)
        self.sampled, self.limited, self.nucleus, top_k, self.slots = send(
            device, torch.int64, rows, limited, nucleus, [drawn[at].top_k for at in limited], slots
        )
        uniform, temperature, top_p, penalty = send(
            device, torch.float64,
            [uniforms[row] for row in rows],
            [max(one.temperature, COLDEST) for one in drawn],
            [drawn[at].top_p for at in nucleus],
            [one.repetition_penalty for one in settings] if self.penalized else [],
        )  # fmt: skip
        self.top_k, self.uniform = top_k.unsqueeze(1), uniform.unsqueeze(1)
        self.temperature = temperature.float().unsqueeze(1)
        self.top_p, self.penalty = top_p.float().unsqueeze(1), penalty.float().unsqueeze(1)


def probabilities(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The distributions to draw from, float32 (sampled rows, vocabulary), as `logits` are.

    Kept tokens hold their probability, filtered ones 0; rows need not sum to 1.
    """
    # Subtracting the largest first changes nothing, and a tiny temperature cannot overflow; one
    # that float32 cannot hold is as good as COLDEST.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(draws.temperature)
    if len(draws.limited):
        picked = scaled[draws.limited]
        lowest = picked.topk(draws.most).values.gather(1, draws.top_k - 1)
        scaled[draws.limited] = picked.masked_fill(picked < lowest, -torch.inf)
    chances = scaled.softmax(-1)
    if len(draws.nucleus):
        chances[draws.nucleus] = _nucleus(chances[draws.nucleus], draws.top_p)
    return chances


def _nucleus(chances: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Zero all but the likeliest tokens that together reach `share`; chances (rows, vocabulary)."""
    count = min(CANDIDATES, chances.shape[1])
    ordered, order = chances.topk(count)
    # On a GPU the question would cost a synchronisation, and a full sort is cheap.
    if chances.is_cuda or bool((ordered.sum(-1, keepdim=True) < share).any()):
        ordered, order = chances.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    before[:, 0] = 0  # the likeliest token always stays
    kept = ordered.masked_fill(before >= share, 0)
    return torch.zeros_like(chances).scatter_(1, order, kept)


def draw(chances: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert each row's cumulative distribution at its number in [0, 1), float64 (rows, 1).

    Returns (rows,); NO_TOKEN for a row that is no distribution. First the block of tokens that the
    point falls into, then the token: on a CPU, running sums over a whole vocabulary take many times
    longer than its sums.
    """
    rows, vocabulary = chances.shape
    padded = F.pad(chances, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else chances
    blocks = padded.view(rows, -1, BLOCK)
    totals = blocks.sum(-1, dtype=torch.float64)
    block, inside = _invert(totals, uniform * totals.sum(-1, keepdim=True))
    tokens = blocks[torch.arange(rows, device=chances.device), block.squeeze(1)]
    token, _ = _invert(tokens, inside)
    possible = tokens.gather(1, token) > 0
    return (block * BLOCK + token).masked_fill_(~possible, NO_TOKEN).squeeze(1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry of each row whose running sum exceeds the point, and how far into it that is.

    weights (rows, entries), points and both results (rows, 1). Never an entry of weight 0.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    end = sums[:, -1:]
    points = torch.minimum(points, torch.nextafter(end, torch.zeros_like(end)))  # rounding
    index = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)  # of NaN
    before = sums.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0)
    return index, points - before


def choose(logits: torch.Tensor, draws: Draws, seen: torch.Tensor | None = None) -> torch.Tensor:
    """One token a row; greedy rows (temperature 0) take the likeliest. Returns (rows,) int64.

    `seen` (slots, vocabulary) are the tokens that a repetition penalty concerns; those that are
    chosen join them. A row whose logits are not numbers gets NO_TOKEN.
    """
    if draws.penalized and seen is not None:
        # A slot whose penalty is 1 may hold an earlier request's marks; 1 changes nothing.
        logits = penalize(logits, seen[draws.slots], draws.penalty)
    if len(draws.sampled) == len(logits):
        tokens = draw(probabilities(logits, draws), draws.uniform)
    else:
        likeliest = logits.argmax(-1, keepdim=True)
        possible = logits.gather(1, likeliest).isfinite()
        tokens = likeliest.masked_fill(~possible, NO_TOKEN).squeeze(1)
        if len(draws.sampled):
            chances = probabilities(logits[draws.sampled], draws)
            tokens[draws.sampled] = draw(chances, draws.uniform)
    if draws.penalized and seen is not None:
        seen[draws.slots, tokens] = True
    return tokens
