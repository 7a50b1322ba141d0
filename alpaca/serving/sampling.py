"""Samples tokens from logits for all requests of a step, each with its own settings and seed.

Order and meaning of the settings are those of transformers' `generate`: repetition penalty over
prompt and answer (Keskar et al. 2019), temperature, top-k (ties are kept), top-p (the smallest set
of likeliest tokens whose probability reaches p, never empty). A token is drawn by inverting the
cumulative distribution at one uniform number, which comes from the request's own generator, so the
draw does not depend on other requests.
"""

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F

from alpaca.serving.request import Sampling, Scored
from alpaca.serving.transfer import send

MIN_TEMPERATURE = 1e-30
MIN_TOP_P = 1e-9  # 0 allows the likeliest token only
BLOCK = 256  # tokens
NO_TOKEN = -1  # the row's logits are NaN or infinite
CANDIDATES = 256  # enough for nearly every top-p set, and 20 times cheaper than a full sort


def generator(seed: int, index: int) -> numpy.random.Generator:
    """The random generator of completion `index` of a request: Philox, keyed by (seed, index)."""
    return numpy.random.Generator(numpy.random.Philox(numpy.random.SeedSequence([seed, index])))


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty.

    logits (rows, vocabulary), seen the same in bool, penalty (rows, 1).
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


class Draws:
    """The sampling settings of each row of a step, sent to the device before the pass starts.

    `sampled` are the rows that are not greedy. `limited` and `nucleus` are indices into `sampled`
    of the rows with a top_k and with a top_p. `slots` are the rows of `seen` (see `choose`).
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        uniforms: Sequence[float],
        vocabulary: int,
        device: torch.device,
        slots: Sequence[int] = (),
    ) -> None:
        """For each row, one of `settings` and a uniform number in [0, 1)."""
        rows = [row for row, setting in enumerate(settings) if setting.temperature > 0]
        chosen = [settings[row] for row in rows]
        limited = [at for at, setting in enumerate(chosen) if 0 < setting.top_k < vocabulary]
        nucleus = [at for at, setting in enumerate(chosen) if setting.top_p < 1]
        self.penalized = any(setting.repetition_penalty != 1 for setting in settings)
        self.counted = any(s.frequency_penalty or s.presence_penalty for s in settings)
        self.most = max((chosen[at].top_k for at in limited), default=0)
        self.sampled, self.limited, self.nucleus, top_k, self.slots = send(
            device, torch.int64, rows, limited, nucleus, [chosen[at].top_k for at in limited], slots
        )
        uniform, temperature, top_p, penalty, frequency, presence = send(
            device,
            torch.float64,
            [uniforms[row] for row in rows],
            [max(setting.temperature, MIN_TEMPERATURE) for setting in chosen],
            [max(chosen[at].top_p, MIN_TOP_P) for at in nucleus],
            [setting.repetition_penalty for setting in settings] if self.penalized else [],
            [setting.frequency_penalty for setting in settings] if self.counted else [],
            [setting.presence_penalty for setting in settings] if self.counted else [],
        )
        self.top_k, self.uniform = top_k.unsqueeze(1), uniform.unsqueeze(1)
        self.temperature = temperature.float().unsqueeze(1)
        self.top_p, self.penalty = top_p.float().unsqueeze(1), penalty.float().unsqueeze(1)
        self.frequency = frequency.float().unsqueeze(1)
        self.presence = presence.float().unsqueeze(1)


def probabilities(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The distributions to draw from: float32 (sampled rows, vocabulary), like `logits`.

    Filtered tokens have probability 0, the others keep theirs, so a row may sum to less than 1.
    """
    # Subtracting the largest logit does not change the result and prevents an overflow at a tiny
    # temperature. MIN_TEMPERATURE replaces temperatures too small for float32.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(draws.temperature)
    if len(draws.limited):
        picked = scaled[draws.limited]
        lowest = picked.topk(draws.most).values.gather(1, draws.top_k - 1)
        scaled[draws.limited] = picked.masked_fill(picked < lowest, -torch.inf)
    probs = scaled.softmax(-1)
    if len(draws.nucleus):
        probs[draws.nucleus] = _nucleus(probs[draws.nucleus], draws.top_p)
    return probs


def _nucleus(probs: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Zero all but the likeliest tokens that together reach `share`; chances (rows, vocabulary)."""
    count = min(CANDIDATES, probs.shape[1])
    ordered, order = probs.topk(count)
    # On a GPU this check would need a synchronisation, and a full sort is cheap.
    if probs.is_cuda or bool((ordered.sum(-1, keepdim=True) < share).any()):
        ordered, order = probs.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    before[:, 0] = 0  # the likeliest token always stays
    kept = ordered.masked_fill(before >= share, 0)
    return torch.zeros_like(probs).scatter_(1, order, kept)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert each row's cumulative distribution at its number in [0, 1), float64 (rows, 1).

    Returns (rows,), NO_TOKEN for a row that is not a distribution. It finds first the block of
    tokens that the point falls into and then the token, because on a CPU a cumulative sum over the
    vocabulary takes many times longer than plain sums.
    """
    rows, vocabulary = probs.shape
    padded = F.pad(probs, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else probs
    blocks = padded.view(rows, -1, BLOCK)
    totals = blocks.sum(-1, dtype=torch.float64)
    block, inside = _invert(totals, uniform * totals.sum(-1, keepdim=True))
    tokens = blocks[torch.arange(rows, device=probs.device), block.squeeze(1)]
    token, _ = _invert(tokens, inside)
    possible = tokens.gather(1, token) > 0
    return (block * BLOCK + token).masked_fill_(~possible, NO_TOKEN).squeeze(1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry of each row whose cumulative sum exceeds the point, and the offset into it.

    weights (rows, entries); points and both results (rows, 1). Never an entry of weight 0.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    end = sums[:, -1:]
    points = torch.minimum(points, torch.nextafter(end, torch.zeros_like(end)))  # rounding
    index = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)  # NaN sums
    before = sums.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0)
    return index, points - before


def score(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[Scored]:
    """The tokens' log probabilities and, for row i, those of the `counts[i]` likeliest tokens.

    logits (rows, vocabulary) as the model computed them, tokens (rows,).
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1).tolist()
    top = logprobs.topk(min(max(counts), logits.shape[1]))
    values, indices = top.values.tolist(), top.indices.tolist()
    return [
        Scored(token, logprob, tuple(zip(ids[:count], best[:count], strict=True)))
        for token, logprob, ids, best, count in zip(
            tokens.tolist(), own, indices, values, counts, strict=True
        )
    ]


def choose(
    logits: torch.Tensor,
    draws: Draws,
    seen: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row, (rows,) int64; greedy rows (temperature 0) take the likeliest.

    `seen` (slots, vocabulary) marks the tokens that the repetition penalty applies to, `counts`
    (the same) says how often each is in the answer; `mark` adds the chosen ones to both. A row
    whose logits are NaN or infinite gets NO_TOKEN. `logits` stay as they are.
    """
    if draws.penalized and seen is not None:
        # A slot with penalty 1 may have marks of an earlier request; they have no effect.
        logits = penalize(logits, seen[draws.slots], draws.penalty)
    if draws.counted and counts is not None:
        used = counts[draws.slots]
        logits = logits - draws.frequency * used - draws.presence * (used > 0)
    if len(draws.sampled) == len(logits):
        tokens = draw(probabilities(logits, draws), draws.uniform)
    else:
        likeliest = logits.argmax(-1, keepdim=True)
        possible = logits.gather(1, likeliest).isfinite()
        tokens = likeliest.masked_fill(~possible, NO_TOKEN).squeeze(1)
        if len(draws.sampled):
            probs = probabilities(logits[draws.sampled], draws)
            tokens[draws.sampled] = draw(probs, draws.uniform)
    return tokens


def mark(
    tokens: torch.Tensor, draws: Draws, seen: torch.Tensor, counts: torch.Tensor | None
) -> None:
    """Add chosen tokens to `seen` and `counts`, once nothing can repeat their pass."""
    if draws.penalized:
        seen[draws.slots, tokens] = True
    if draws.counted and counts is not None:
        counts[draws.slots, tokens] += 1
