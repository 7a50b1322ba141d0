"""The append-only record of a run: every reply that was paid for, and the verdict on its tasks.

It holds one JSON object per line. A reply is synced to disk before it is used, so a run that is
killed at any moment resumes from its journal without paying again. The first line holds the
settings that shape the replies; resuming with others would mix two runs, so it is refused. Each
line ends in a checksum of itself, so a changed byte is detected and refused.
"""

import json
import os
import re
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alpaca import atomic
from alpaca.errors import UNLOCKED, UserError

FORMAT = 2
UNCHECKED = 1  # the format before lines had checksums; such journals are still read

CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\Z')

Entry = dict[str, Any]


def side_file(output: Path, what: str) -> Path:
    """The file `what` next to an output, such as its journal."""
    return output.with_name(f"{output.stem}.{what}.jsonl")


class Journal:
    """One open journal, held by one process at a time.

    `entries` are its lines when it was opened, without the first.
    """

    def __init__(self, path: Path, settings: Entry) -> None:
        """Open or create the journal of a run with these settings (JSON values).

        Raises:
            UserError: another process has locked it, it was created with other settings, or a line
                other than the last (a kill can only truncate the last) cannot be read.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "a+b")  # noqa: SIM115 - open until close()
        try:
            self._lock()
            lines = self._whole_lines()
            self.entries: list[Entry] = []
            for number, line in enumerate(lines, 1):
                begun = self.entries[0].get("format") if self.entries else None
                self.entries.append(self._entry(number, line, checked=begun != UNCHECKED))
            if self.entries:
                self._check(self.entries.pop(0), settings)
            else:
                self.append({"entry": "run", "format": FORMAT, "settings": settings})
                atomic.sync(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Entry, *, durable: bool = True) -> None:
        """Add one line; with `durable`, return only when it is on disk."""
        # ASCII only: a teacher can send a lone surrogate, which UTF-8 cannot encode.
        self._file.write(_line(entry))
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file, which releases the lock."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        """Use it in a with block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _lock(self) -> None:
        busy = UserError(
            f"Another run is writing {self.path}.", "Wait for it, or choose another --output."
        )
        if not atomic.flock(self._file.fileno(), busy):
            print(f"generate: {UNLOCKED.format(self.path.parent)}", flush=True)

    def _whole_lines(self) -> list[bytes]:
        """Every complete line; a last one that a kill left incomplete is removed from the file."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        return whole.split(b"\n")[:-1]

    def _entry(self, number: int, line: bytes, *, checked: bool) -> Entry:
        found = CHECKSUM.search(line)
        whole = line[: found.start()] + b"}" if found else line
        try:
            value = json.loads(whole)
        except (ValueError, RecursionError):
            value = None
        if found:
            sound = int(found[1], 16) == zlib.crc32(whole)
        else:
            sound = isinstance(value, dict) and (not checked or value.get("format") == UNCHECKED)
        if not sound or not isinstance(value, dict):
            raise UserError(
                f"{self.path} is damaged: line {number} was changed.",
                "Restore the file from a copy, or move it away to start over (and pay again).",
            )
        return value

    def _check(self, begun: Entry, settings: Entry) -> None:
        known = begun.get("entry") == "run" and begun.get("format") in (FORMAT, UNCHECKED)
        if not known or not isinstance(begun.get("settings"), dict):
            raise UserError(
                f"{self.path} is not a journal this version can resume from.",
                "Move it away, or choose another --output.",
            )
        differing = [
            f"{name} was {begun['settings'].get(name)!r} and is now {value!r}"
            for name, value in settings.items()
            if begun["settings"].get(name) != value
        ]
        if differing:
            raise UserError(
                f"{self.path} was started with other settings: {'; '.join(differing)}.",
                "Use the same settings to resume, or another --output to start over.",
            )


def _line(entry: Entry) -> bytes:
    """An entry as its line, whose last key is the CRC-32 of the line without it."""
    whole = json.dumps(entry).encode()
    return b'%s, "crc32": "%08x"}\n' % (whole[:-1], zlib.crc32(whole))
