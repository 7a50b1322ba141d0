"""Signals that ask a running job to save: SIGUSR1 to go on, SIGTERM and Ctrl-C to stop.

A signal only leaves a mark; the loop looks at it between steps, together with the other ranks,
because a checkpoint is written by all of them at once. After the last step there is nothing left
to stop: the export goes on, and the run ends as if there had been no signal.
"""

import signal
from types import FrameType

SAVE, STOP = 1, 2


class Requests:
    """What the signals received so far ask for: 0, SAVE or STOP."""

    def __init__(self) -> None:
        """Take over the signals; a second Ctrl-C stops at once."""
        self._save = False
        self.number = 0  # of the signal that asked to stop
        signal.signal(signal.SIGUSR1, self._mark)
        signal.signal(signal.SIGTERM, self._mark)
        signal.signal(signal.SIGINT, self._mark)

    @property
    def wanted(self) -> int:
        """The most that was asked for."""
        return STOP if self.number else SAVE if self._save else 0

    def _mark(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.number = number

    def saving(self) -> None:
        """A save begins: a wish for one is fulfilled, one to stop remains."""
        self._save = False


class StoppedError(Exception):
    """The job saved a checkpoint because a signal asked it to stop."""

    def __init__(self, number: int, step: int) -> None:
        """`number` is the signal's; another rank's where it is 0."""
        super().__init__(f"stopped after step {step}")
        self.exit_code = 128 + (number or signal.SIGTERM)
