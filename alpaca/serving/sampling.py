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

COLDEST = 1e-30
BLOCK = 256  # tokens
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


def probabilities(logits: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """The distributions to draw from, float32 (rows, vocabulary); every temperature is above 0.

    Kept tokens hold their probability, filtered ones 0; rows need not sum to 1.
    """
    # Subtracting the largest first changes nothing, and a tiny temperature cannot overflow; one
    # that float32 cannot hold is as good as COLDEST.
    temperature = _column([max(one.temperature, COLDEST) for one in settings], logits)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    rows = [row for row, one in enumerate(settings) if 0 < one.top_k < scaled.shape[1]]
    if rows:
        counts = torch.tensor([[settings[row].top_k] for row in rows], device=logits.device)
        picked = scaled[rows]
        largest = picked.topk(max(settings[row].top_k for row in rows)).values
        scaled[rows] = picked.masked_fill(picked < largest.gather(1, counts - 1), -torch.inf)
    chances = scaled.softmax(-1)
    rows = [row for row, one in enumerate(settings) if one.top_p < 1]
    if rows:
        chances[rows] = _nucleus(chances[rows], _column([settings[r].top_p for r in rows], logits))
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


def draw(chances: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Invert each row's cumulative distribution at a uniform number in [0, 1); returns (rows,).

    First the block of tokens that the point falls into, then the token: on a CPU, running sums
    over a whole vocabulary take many times longer than its sums.
    """
    rows, vocabulary = chances.shape
    if rest := vocabulary % BLOCK:
        chances = F.pad(chances, (0, BLOCK - rest))
    blocks = chances.view(rows, -1, BLOCK)
    totals = blocks.sum(-1, dtype=torch.float64)
    block, inside = _invert(totals, _column(uniforms, totals) * totals.sum(-1, keepdim=True))
    tokens = blocks[torch.arange(rows, device=chances.device), block.squeeze(1)]
    token, _ = _invert(tokens, inside)
    return (block * BLOCK + token).squeeze(1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry of each row whose running sum exceeds the point, and how far into it that is.

    weights (rows, entries), points and both results (rows, 1). Never an entry of weight 0.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    end = sums[:, -1:]
    points = torch.minimum(points, torch.nextafter(end, torch.zeros_like(end)))  # rounding
    index = torch.searchsorted(sums, points, right=True)
    before = sums.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0)
    return index, points - before


def choose(
    logits: torch.Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]
) -> torch.Tensor:
    """One token a row; greedy rows (temperature 0) take the likeliest. Returns (rows,) int64."""
    rows = [row for row, one in enumerate(settings) if one.temperature > 0]
    if len(rows) == len(settings):
        return draw(probabilities(logits, settings), uniforms)
    likeliest = logits.argmax(-1)
    if rows:
        chances = probabilities(logits[rows], [settings[row] for row in rows])
        likeliest[rows] = draw(chances, [uniforms[row] for row in rows])
    return likeliest


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
