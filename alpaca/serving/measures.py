"""What the engine counts while it serves; `/metrics` prints it.

Only the engine's thread writes. A reader may see a count that is one step behind another.
"""

from bisect import bisect_left
from collections import Counter

# seconds: a token takes milliseconds on a GPU; on a CPU a long prompt takes a minute
SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Histogram:
    """How often a time in seconds fell into each bucket; the last bucket has no upper limit."""

    def __init__(self) -> None:
        """Empty buckets."""
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


class Measures:
    """Counts since the engine was made.

    `ended` counts completions by reason: eos, stop, length, context, time, failed or canceled.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.requests = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.ended: Counter[str] = Counter()
        self.first_token = Histogram()
        self.between_tokens = Histogram()

    def end(self, reason: str) -> None:
        """Count a completion that has ended."""
        self.ended[reason] += 1
