"""What a check returns: green or red, in one line, and what to do about red."""

import sys
from dataclasses import dataclass

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `remedy` is what to do where it is not `ok`."""

    name: str
    ok: bool
    told: str
    remedy: str = ""

    def line(self, colored: bool | None = None) -> str:
        """The finding as it is printed; colored on a terminal."""
        colored = sys.stdout.isatty() if colored is None else colored
        word = "ok " if self.ok else "BAD"
        if colored:
            word = f"{GREEN if self.ok else RED}{word}{PLAIN}"
        told = f"{word}  {self.name:<12} {self.told}"
        return told if self.ok or not self.remedy else f"{told}\n{'':18}-> {self.remedy}"
