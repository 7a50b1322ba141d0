"""What the runner and the web server need of an engine: the own one, and one behind a URL.

Both check a request in the same way before anything is computed, so both refuse the same ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from alpaca.errors import UserError
from alpaca.serving.adapters import Adapters
from alpaca.serving.measures import Measures
from alpaca.serving.request import Job, Request
from alpaca.tokens import Codec

SHRINKING = 4  # normalizing a text (Unicode's NFC, NFKC) leaves at least a quarter of its bytes
STOPS = 16  # each is searched for at every token
STOP_LENGTH = 1000  # characters


class EngineStoppedError(RuntimeError):
    """The engine has been stopped, or what computes for it has died."""


class BusyError(RuntimeError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True)
class Limits:
    """Limits of the queue and of a step, and when the engine counts as unhealthy.

    At most `waiting` requests queue for a slot, and a step computes at most `prefill_tokens` prompt
    tokens. An answer that has had its slot for `seconds` ends there. The engine is unhealthy during
    a step of more than `stuck_seconds`, or after `failures` failed steps in a row.
    """

    waiting: int = 256
    prefill_tokens: int = 128
    seconds: float = math.inf
    stuck_seconds: float = 60.0
    failures: int = 5


class Room(Protocol):
    """How many answers are made at once, and the most tokens of one with its prompt."""

    @property
    def slots(self) -> int:
        """Answers."""

    @property
    def length(self) -> int:
        """Tokens."""


class Engine(Protocol):
    """Answers requests; all of it may be used by any thread.

    table: the bytes of each token of the model's vocabulary.
    """

    table: Sequence[bytes]
    measures: Measures
    limits: Limits

    @property
    def adapters(self) -> Adapters[Any]:
        """The names that a request may ask for."""

    @property
    def capacity(self) -> Room:
        """What can be computed together."""

    def submit(self, request: Request, notify: Callable[[], None] | None = None) -> Job:
        """Queue a request; `notify` is called when a completion has changed.

        Raises:
            UserError: as `check`; or no adapter has the name asked for.
            BusyError: the queue is full.
            EngineStoppedError: the engine has stopped.
        """

    def check_text(self, size: int) -> None:
        """Raise UserError for a prompt of `size` bytes that cannot fit, however it is encoded."""

    def load_adapter(self, name: str, folder: Path, codec: Codec) -> None:
        """Serve one more adapter; `codec` is the base's. New requests can name it on return.

        Raises:
            UserError: the folder is damaged, belongs to another base or other templates, or does
                not fit into memory; or the name is taken.
            EngineStoppedError: the engine has stopped.
        """

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away; UserError if there is none of that name, or it is the default."""

    def stop(self) -> None:
        """End it; unfinished requests fail with EngineStoppedError."""

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""

    @property
    def waiting(self) -> int:
        """Number of requests that wait for slots."""

    @property
    def idle_slots(self) -> int:
        """Number of free slots."""


def check(request: Request, room: Room, vocabulary: int) -> None:
    """Refuse what no engine can answer; `vocabulary` counts the ids that exist.

    Raises:
        UserError: the prompt is empty, is too long, or contains tokens that do not exist; n is
            larger than the number of slots; or stop strings are too many or too long.
    """
    if request.n > room.slots:
        raise UserError(f"n={request.n}, but the engine has {room.slots} slots.")
    if len(request.stop) > STOPS or any(len(text) > STOP_LENGTH for text in request.stop):
        raise UserError(
            f"stop may hold up to {STOPS} texts of up to {STOP_LENGTH} characters each.",
            "Use fewer, or only their beginnings.",
        )
    if len(request.prompt) >= room.length:
        raise UserError(
            f"The prompt has {len(request.prompt)} tokens; prompt and answer together may "
            f"have {room.length}.",
            "Shorten it.",
        )
    known = range(vocabulary)
    if not request.prompt or not all(token in known for token in request.prompt):
        raise UserError(
            f"A prompt is one or more tokens from 0 to {known[-1]}.",
            "Encode it with the model's own tokenizer.",
        )


def check_text(size: int, length: int, table: Sequence[bytes]) -> None:
    """Raise UserError for a text of `size` bytes that cannot fit into `length` tokens.

    The limit assumes that every token is as long as the longest one in `table`, so it never refuses
    a prompt that `check` would accept.
    """
    most = SHRINKING * length * max(map(len, table))
    if size > most:
        raise UserError(
            f"The prompt has {size:,} bytes; one with more than {most:,} cannot fit into {length} "
            "tokens.",
            "Shorten it.",
        )


def busy(waiting: int) -> BusyError:
    """The error of a full queue."""
    return BusyError(f"{waiting} requests are already waiting; try again later.")
