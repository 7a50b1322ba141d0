"""How fast `alpaca verify` hashes, compared with how fast the same files can be read.

    python bench/verify.py [--folder DIR | --gigabytes 4 --files 4]

Both read from the disk: the page cache is emptied of the files before each pass. Rounds alternate
between reading and verifying, so that drifts of the disk's speed affect both. Last line: JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alpaca import passport, verify

PIECE = 8 << 20


def make(folder: Path, gigabytes: float, count: int) -> None:
    """A folder of files that don't compress, with its passport."""
    folder.mkdir(parents=True)
    block = os.urandom(PIECE)
    for number in range(count):
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            for _ in range(round(gigabytes * 1e9 / count / PIECE)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    passport.write(folder, "bench")


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(path: Path) -> None:
    """Read a file and do nothing with it."""
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(folder: Path, how: str) -> float:
    """Seconds of one pass with a cold page cache."""
    forget(folder)
    started = time.perf_counter()
    if how == "verify":
        verify.run(verify.parser().parse_args([str(folder), "--no-golden"]))
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(read, sorted(folder.glob("*.safetensors"))))
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--folder", type=Path)
    options.add_argument("--gigabytes", type=float, default=4.0)
    options.add_argument("--files", type=int, default=4)
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        folder = arguments.folder or Path(scratch, "model")
        if arguments.folder is None:
            make(folder, arguments.gigabytes, arguments.files)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"read": [], "verify": []}
        for _ in range(arguments.rounds):
            for how, spent in seconds.items():
                spent.append(timed(folder, how))
                print(f"{how}: {size / spent[-1] / 1e6:,.0f} MB/s", flush=True)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    speeds = {how: round(size / statistics.median(spent) / 1e6) for how, spent in seconds.items()}
    print(json.dumps({"of_read_speed": round(statistics.median(ratios), 3), "mb_s": speeds}))


if __name__ == "__main__":
    main()
