"""Which shards of a partial folder are finished, so that a second run can keep them.

The manifest names each finished shard with its SHA-256, and what it was made from. It is written
after the shard is synced: after a power cut it can only know less than there is, never more.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from alpaca import atomic, passport
from alpaca.shards import Shard


class Manifest:
    """Which shards of a partial folder are finished, and the SHA-256 each must have."""

    def __init__(self, path: Path, partial: Path, made_from: str) -> None:
        """Read what an interrupted run noted; nothing where it made something else."""
        self.path, self.partial, self.made_from = path, partial, made_from
        self.hashes: dict[str, str] = {}
        held = _read(self.path)
        if held.get("made_from") == made_from:
            self.hashes = dict(held["shards"])

    def clear(self) -> None:
        """Delete everything written so far."""
        self.hashes = {}
        self.path.unlink(missing_ok=True)
        self._delete_others()

    def _delete_others(self) -> None:
        """Delete what is not a finished shard, for it would end up in the finished folder."""
        for path in self.partial.iterdir():
            if path.name not in self.hashes:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def keep(self, planned: list[Shard[Any]]) -> set[str]:
        """Names of the finished shards whose content still has its hash; the rest is deleted."""
        for shard in planned:
            path = self.partial / shard.name
            if shard.name in self.hashes and not (
                path.is_file() and passport.sha256(path) == self.hashes[shard.name]
            ):
                del self.hashes[shard.name]
        self._delete_others()
        if self.hashes:
            print(f"Going on: {len(self.hashes)} of {len(planned)} shards are finished.")
        return set(self.hashes)

    def add(self, name: str, digest: str) -> None:
        """Note a shard as finished; it must be synced before."""
        self.hashes[name] = digest
        held = {"made_from": self.made_from, "shards": self.hashes}
        atomic.write_text(self.path, json.dumps(held, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held
