"""Record which shards of a partial folder are finished, so that a second run can keep them.

The manifest holds the SHA-256 of each finished shard and a fingerprint of the input. It is
written after the shard is synced, so after a power cut it may lack a finished shard but never lists
an unfinished one.
"""

import json
from pathlib import Path
from typing import Any

from alpaca import atomic, passport
from alpaca.shards import Shard


class Manifest:
    """The finished shards of a partial folder and the SHA-256 of each."""

    def __init__(self, path: Path, partial: Path, made_from: str) -> None:
        """Read the manifest of an interrupted run, unless it was made from other input."""
        self.path, self.partial, self.made_from = path, partial, made_from
        self.hashes: dict[str, str] = {}
        content = _read(self.path)
        if content.get("made_from") == made_from:
            self.hashes = dict(content["shards"])

    def clear(self) -> None:
        """Delete everything written so far."""
        self.hashes = {}
        self.path.unlink(missing_ok=True)
        self._delete_others()

    def _delete_others(self) -> None:
        """Delete everything but finished shards; it would end up in the finished folder."""
        for path in self.partial.iterdir():
            if path.name not in self.hashes:
                atomic.remove(path)

    def keep(self, planned: list[Shard[Any]]) -> set[str]:
        """Names of the finished shards whose hash still matches; deletes all other files."""
        for shard in planned:
            path = self.partial / shard.name
            if shard.name in self.hashes and not (
                path.is_file() and passport.sha256(path) == self.hashes[shard.name]
            ):
                del self.hashes[shard.name]
        self._delete_others()
        if self.hashes:
            print(f"Resuming: {len(self.hashes)} of {len(planned)} shards done.")
        return set(self.hashes)

    def add(self, name: str, digest: str) -> None:
        """Record a shard as finished; it must be synced first."""
        self.hashes[name] = digest
        content = {"made_from": self.made_from, "shards": self.hashes}
        atomic.write_text(self.path, json.dumps(content, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content
