"""How long a conversion takes, compared with copying the same bytes, and its peak memory.

Writes a synthetic LLaMA 1 7B (13.5 GB in fp16; --scale 0.1 keeps the shapes and drops layers), with
a checklist like Meta's. Then it times, in one run, `cp` with reading the copy back, and the
converter (which hashes what it reads, hashes what it writes, and reads it back from the disk).
Needs twice the model's size on disk. The page cache is dropped before each part.

    python bench/convert.py [--scale 0.1] [--folder /tmp]
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DIM, LAYERS, WIDTH, VOCAB = 4096, 32, 11008, 32000
PIECE = 16 << 20


def main() -> None:
    """Make the checkpoint, time both, print one JSON line."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--scale", type=float, default=1.0, help="share of the 32 layers")
    options.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-convert-") as name:
        print(json.dumps(measure(Path(name), max(1, round(LAYERS * arguments.scale)))))


def measure(folder: Path, layers: int) -> dict[str, object]:
    source = make_checkpoint(folder / "in" / "7B", layers)
    size = source.stat().st_size
    print(f"{size / 1e9:.1f} GB, {layers} layers", file=sys.stderr)
    copy = folder / "copy"
    cp = timed(lambda: run(["cp", str(source), str(copy)], ["sync", str(copy)]), source)
    read = timed(lambda: read_through(copy), copy)
    copy.unlink()
    command = [sys.executable, "-m", "alpaca", "convert"]
    command += ["--input_dir", str(folder / "in"), "--output_dir", str(folder / "out")]
    start = timed(lambda: run([sys.executable, "-c", "import alpaca.convert.command"]), source)
    memory = Memory()
    seconds = timed(lambda: memory.watch(command), source)
    return {
        "gigabytes": round(size / 1e9, 2),
        "cp_seconds": round(cp, 1),
        "read_back_seconds": round(read, 1),
        "convert_seconds": round(seconds, 1),
        "of_it_imports": round(start, 1),
        "megabytes_per_second": round(size / 1e6 / seconds),
        "time_vs_cp": round(seconds / (cp + read), 2),
        "time_vs_cp_alone": round(seconds / cp, 2),
        "peak_private_mb": round(memory.peak / 1e6),
        "cores": os.cpu_count(),
    }


def make_checkpoint(folder: Path, layers: int) -> Path:
    """params.json, consolidated.00.pth, tokenizer.model and checklist.chk, in little memory."""
    sys.path.insert(0, str(ROOT / "tests"))
    from wheels import SENTENCEPIECE

    folder.mkdir(parents=True)
    path = folder / "consolidated.00.pth"
    # Untouched pages of torch.empty cost nothing; the numbers are written straight to the file.
    tensors = {name: torch.empty(size, dtype=torch.float16) for name, size in sizes(layers).items()}
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    fill(path)
    params = {"dim": DIM, "multiple_of": 256, "n_heads": 32, "n_layers": layers}
    (folder / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-6, "vocab_size": -1}))
    shutil.copy(SENTENCEPIECE.path(), folder / "tokenizer.model")
    with open(folder / "checklist.chk", "w") as checklist:
        for part in (path, folder / "params.json"):
            with open(part, "rb") as file:
                print(
                    f"{hashlib.file_digest(file, 'md5').hexdigest()}  {part.name}", file=checklist
                )
    return path


def sizes(layers: int) -> dict[str, tuple[int, ...]]:
    """Meta's names and the shapes of LLaMA 1 7B."""
    kinds = {
        "attention.wq": (DIM, DIM),
        "attention.wk": (DIM, DIM),
        "attention.wv": (DIM, DIM),
        "attention.wo": (DIM, DIM),
        "feed_forward.w1": (WIDTH, DIM),
        "feed_forward.w2": (DIM, WIDTH),
        "feed_forward.w3": (WIDTH, DIM),
        "attention_norm": (DIM,),
        "ffn_norm": (DIM,),
    }
    named: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCAB, DIM),
        "norm.weight": (DIM,),
        "output.weight": (VOCAB, DIM),
    }
    for layer in range(layers):
        named |= {f"layers.{layer}.{kind}.weight": size for kind, size in kinds.items()}
    return named


def fill(path: Path) -> None:
    """Random numbers for every storage of a PyTorch file that was saved without its data."""
    noise = (torch.randn(33_554_432 + 7) / 64).to(torch.float16).view(torch.uint8).numpy().data
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    with open(path, "r+b") as file:
        for number, entry in enumerate(entries):
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)  # of the name and of the extra field, in the local header
            file.seek(sum(struct.unpack("<HH", lengths)), os.SEEK_CUR)
            own = noise[2 * number :]  # or the output would equal the embedding, and be tied to it
            for start in range(0, entry.file_size, len(own)):
                file.write(own[: entry.file_size - start])
        file.flush()
        os.fsync(file.fileno())


def timed(body: Callable[[], object], cold: Path) -> float:
    """Seconds of `body`, started with nothing of `cold` in the page cache."""
    with open(cold, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    body()
    return time.monotonic() - began


def run(*commands: list[str]) -> None:
    for command in commands:
        subprocess.run(command, check=True, cwd=ROOT)


def read_through(path: Path) -> None:
    buffer = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(buffer):
            pass


class Memory:
    """Peak memory of a command itself: anonymous pages, without the page cache."""

    peak = 0

    def watch(self, command: list[str]) -> None:
        """Run a command and sample its memory twenty times a second."""
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None:
            self.peak = max(self.peak, anonymous_bytes(process.pid))
            time.sleep(0.05)
        assert process.returncode == 0, command


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
