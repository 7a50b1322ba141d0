"""When a run that pays for replies stops, the flags that say so, and how far it is."""

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alpaca.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm


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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that limit and pace a run; `given` reads them."""
    add = parser.add_argument
    add("--concurrency", type=positive, default=8, help="requests in flight")
    add("--max_cost", type=float, help="most money to spend; needs both prices")
    add("--price_in", type=float, help="price per million tokens sent")
    add("--price_out", type=float, help="price per million tokens received")
    add("--max_total_tokens", type=positive, help="most tokens to use, sent and received")
    add("--timeout", type=float, default=600, help="timeout of one attempt in seconds")
    add("--retries", type=int, default=8, help="retries after a transient failure")


def given(arguments: argparse.Namespace, wanted: int) -> Limits:
    """The limits that the flags set.

    Raises:
        UserError: a flag has a value that no run can have.
    """
    if not arguments.timeout > 0 or arguments.retries < 0:
        raise UserError("--timeout is above 0, --retries at least 0.")
    if arguments.max_cost is not None and None in (arguments.price_in, arguments.price_out):
        raise UserError("--max_cost needs --price_in and --price_out.", "Give all three.")
    for flag in ("max_cost", "price_in", "price_out"):
        value = getattr(arguments, flag)
        if value is not None and not value >= 0:
            raise UserError(f"--{flag} is {value}.", "Give a number of at least 0.")
    return Limits(
        wanted=wanted,
        concurrency=arguments.concurrency,
        price_in=arguments.price_in or 0.0,
        price_out=arguments.price_out or 0.0,
        max_cost=arguments.max_cost,
        max_total_tokens=arguments.max_total_tokens,
    )


def positive(text: str) -> int:
    """The type of a flag that is a number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def progress_bar(unit: str, total: int, done: int = 0) -> "tqdm[Any]":
    """A bar on stderr, which a file of it gets a line of every half minute."""
    from tqdm import tqdm  # imported here: `--help` needs none

    return tqdm(
        total=total,
        initial=done,
        unit=f" {unit}",
        dynamic_ncols=True,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
