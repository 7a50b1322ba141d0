"""The result of a check: one line, green or red, and what to do when it is red."""

import sys
from dataclasses import dataclass

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was found, and what to do when it is not `ok`."""

    name: str
    ok: bool
    message: str
    remedy: str = ""

    def line(self, colored: bool | None = None) -> str:
        """The finding as it is printed; colored on a terminal."""
        colored = sys.stdout.isatty() if colored is None else colored
        word = "ok " if self.ok else "BAD"
        if colored:
            word = f"{GREEN if self.ok else RED}{word}{PLAIN}"
        text = f"{word}  {self.name:<12} {self.message}"
        return text if self.ok or not self.remedy else f"{text}\n{'':18}-> {self.remedy}"
