"""The one exception for mistakes that a user can fix: what happened, and what to do about it.

Any other exception is a bug and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT)
# Printed where a folder cannot be locked; {} is the folder.
UNLOCKED = "{} is on a disk without file locks: make sure that no other process writes there"


class UserError(Exception):
    """Says what happened and what to do.

    The entry points print it without a traceback and exit with code 2.
    """

    def __init__(self, happened: str, remedy: str = "") -> None:
        """`happened` is a sentence; `remedy`, if any, says what to type or change."""
        super().__init__(f"{happened}\n  {remedy}" if remedy else happened)
        self.happened = happened
        self.remedy = remedy


def exit_code(program: str, body: Callable[[], None]) -> int:
    """Run a command's body and return its exit code: 0, 2 on a user's mistake, 130 on Ctrl-C."""
    try:
        body()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"{program}: error: {error.filename}: permission denied", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"{program}: error: the disk is full{where}\n"
            "  Free some space and run the same command again; what is complete is kept.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
