"""When a run that pays for replies stops: how many are wanted, and its budget."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """When to stop; prices are per million tokens, in any currency."""

    wanted: int
    concurrency: int = 8
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_total_tokens: int | None = None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What these tokens cost."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def allow(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether a total of these tokens stays within the budget."""
        tokens = self.max_total_tokens is None or tokens_in + tokens_out <= self.max_total_tokens
        return tokens and (
            self.max_cost is None or self.cost(tokens_in, tokens_out) <= self.max_cost
        )
