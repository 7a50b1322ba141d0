"""Signals that make a running job save: on SIGUSR1 it continues, on SIGTERM or Ctrl-C it stops.

A signal handler only sets a flag. All ranks check the flags together between steps, because they
write a checkpoint together. After the last step there is nothing left to stop: the export
continues, and the run ends as if there had been no signal.
"""

import signal
from types import FrameType

SAVE, STOP = 1, 2


class Requests:
    """What the signals received so far ask for: 0, SAVE or STOP."""

    def __init__(self) -> None:
        """Install the signal handlers; a second Ctrl-C stops at once."""
        self._save = False
        self.number = 0  # of the signal that asked to stop
        signal.signal(signal.SIGUSR1, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    @property
    def wanted(self) -> int:
        """The strongest request so far."""
        return STOP if self.number else SAVE if self._save else 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.number = number

    def saving(self) -> None:
        """Call when a save begins: a pending save is cleared, a pending stop is kept."""
        self._save = False


class StoppedError(Exception):
    """The job saved a checkpoint because a signal asked it to stop."""

    def __init__(self, number: int, step: int, *, resumes: bool = True) -> None:
        """`number` is the signal's; 0 where another rank received it.

        `resumes`: the same command goes on from that checkpoint.
        """
        then = (
            "run the same command again to resume"
            if resumes
            else f"its model is checkpoint-{step}, from which no run resumes"
        )
        super().__init__(f"stopped after step {step}; {then}")
        self.exit_code = 128 + (number or signal.SIGTERM)
