"""What the environment sets for all engines, and which of them it asks for."""

from collections.abc import Mapping

from alpaca.errors import UserError

CONTEXT = 8192  # default of ALPACA_CONTEXT; with longer slots, fewer fit into memory
SECONDS = 3600  # default of ALPACA_MAX_SECONDS
DTYPES = ("float32", "bfloat16")
ENGINE, URL = "ALPACA_ENGINE", "ALPACA_ENGINE_URL"


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A whole number above 0; UserError for anything else."""
    value = environment.get(name, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name} is {value!r}.", "Set it to a whole number above 0.")
    return int(value)


def dtype(environment: Mapping[str, str]) -> str | None:
    """ALPACA_DTYPE; UserError for a type that is none of `DTYPES`."""
    named = environment.get("ALPACA_DTYPE")
    if named is not None and named not in DTYPES:
        raise UserError(f"ALPACA_DTYPE is {named!r}.", f"Set it to {' or '.join(DTYPES)}.")
    return named


def has_other_engine(environment: Mapping[str, str]) -> bool:
    """Whether another engine than the own one is to answer.

    Raises:
        UserError: there is none of that name, or two are asked for.
    """
    kind, url = environment.get(ENGINE) or "own", environment.get(URL)
    if kind not in ("own", "vllm"):
        raise UserError(f"{ENGINE} is {kind!r}.", f"Set it to own or vllm, or {URL} to servers.")
    if kind == "vllm" and url:
        raise UserError(f"{ENGINE} and {URL} are both set.", f"Leave {ENGINE} out to use {URL}.")
    return kind == "vllm" or bool(url)
