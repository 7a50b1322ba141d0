"""The one exception for mistakes a user can mend: what happened, and what to do about it.

Everything else that goes wrong is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Says what happened and what to do; the doors print it without a traceback, exit code 2."""

    def __init__(self, happened: str, remedy: str = "") -> None:
        """`happened` is a sentence; `remedy`, when there is one, says what to type or change."""
        super().__init__(f"{happened}\n  {remedy}" if remedy else happened)
        self.happened = happened
        self.remedy = remedy


def exit_code(program: str, body: Callable[[], None]) -> int:
    """Run a command's body: 0 when it ends, 2 on a user's mistake, 130 on Ctrl-C."""
    try:
        body()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"{program}: error: {error.filename}: permission denied", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
