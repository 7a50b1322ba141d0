"""Walk the header of a GGUF file before it is read: every count must fit into the file.

The `gguf` package believes the counts of a damaged or hostile file and loops over them for hours.
Format: the GGUF specification, versions 2 and 3; all numbers are little-endian.
"""

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# Bytes of a value, by its type's number: integers, bool (7) and floats of 8 to 64 bits.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMENSIONS = 4
MOST_ENTRIES = 1 << 20  # tensors, keys, and values of an array; Llama 3 has 280,000 merges


def check(path: Path) -> None:
    """Raise ValueError, with the reason, unless the header describes what can be in the file."""
    if path.stat().st_size < len(MAGIC) + 4 + 8 + 8:
        raise ValueError("it is too short")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    """A place in the file that moves forward; never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> None:
        if self.data[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.skip(len(MAGIC))
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; 2 and 3 are known")
        tensors, keys = self.count("tensors"), self.count("keys")
        for _ in range(keys):
            self.skip(self.number("<Q"))  # the key
            self.value(self.number("<I"))
        for _ in range(tensors):
            self.skip(self.number("<Q"))  # the name
            if (dimensions := self.number("<I")) > MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)  # shape, type, offset

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY:
            self.array(self.number("<I"))
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    def array(self, kind: int) -> None:
        count = self.count("values")
        if kind == STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif kind in SIZES:
            self.skip(count * SIZES[kind])
        else:
            raise ValueError(f"an array has the unknown type {kind}")

    def count(self, what: str) -> int:
        number = self.number("<Q")
        if number > MOST_ENTRIES:
            raise ValueError(f"it claims {number:,} {what}")
        return number

    def number(self, code: str) -> int:
        start = self.at
        self.skip(struct.calcsize(code))
        found: int = struct.unpack_from(code, self.data, start)[0]
        return found

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it ends within its header")
