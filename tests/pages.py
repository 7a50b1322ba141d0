"""Pages in Chromium: the command that serves one, and what goes wrong in a tab."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving_page(
    command: Sequence[str], cwd: Path
) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    """A command that prints its page's address and then serves it: process, address, printed."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, found.group(), said
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def note_errors(tab: Any, errors: list[str]) -> None:
    """Collect a tab's exceptions, dialogs and console errors.

    Chromium reports every answer that is no success, which is the page's to tell its reader.
    """

    def console(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            errors.append(message.text)

    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    tab.on("console", console)
