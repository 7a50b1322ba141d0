"""Time from a command's start to its first own line, for two versions of this program.

    git worktree add /tmp/before 37aa7f8
    python bench/startup.py --before /tmp/before [--rounds 5]

Each round runs `verify`, `train.py` and `serve` of both versions, one after the other, on a small
model made here. A first own line is the first line that this program prints; what libraries print
is skipped. For `serve` it is the line of the loaded model. Last line: JSON, medians in seconds.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data/seed_tasks.jsonl"
PORT = "5077"


def main() -> None:
    """Measure, print a line for each command and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of another version")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    versions = {"before": options.before.resolve(), "after": ROOT}
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = convert(Path(folder))
        for round_ in range(options.rounds):
            for version, tree in versions.items():
                for name, (words, mark) in commands(model, Path(folder) / f"out{round_}").items():
                    seconds = first_line(tree, words, mark)
                    found.setdefault(name, {}).setdefault(version, []).append(seconds)
    result = {}
    for name, times in found.items():
        medians = {version: round(statistics.median(all_), 2) for version, all_ in times.items()}
        result[name] = {**medians, "ratio": round(medians["after"] / medians["before"], 3)}
        print(name, result[name], {v: [round(t, 2) for t in all_] for v, all_ in times.items()})
    print(json.dumps(result))


def convert(folder: Path) -> Path:
    """A tiny model, converted; returns its folder."""
    from alpaca.doctor import tiny

    tiny.write(folder / "source/tiny", DATA)
    words = ["convert", "--input_dir", folder / "source/tiny", "--output_dir", folder / "weights"]
    subprocess.run(
        [sys.executable, "-m", "alpaca", *map(str, words)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "weights/tiny"


def commands(model: Path, out: Path) -> dict[str, tuple[list[str], str]]:
    """The words of each command, and what its first own line contains."""
    train = ["train.py", "--model_name_or_path", model, "--data_path", DATA, "--output_dir", out]
    return {
        "verify": (["-m", "alpaca", "verify", str(model)], ""),
        "verify, verdict": (["-m", "alpaca", "verify", str(model)], "golden prompts (made"),
        "train": ([str(word) for word in [*train, "--max_steps", "1"]], ""),
        "serve": (["-m", "alpaca", "serve", "--weights", str(model), "--port", PORT], "serving "),
    }


def first_line(tree: Path, words: list[str], mark: str) -> float:
    """Seconds until a line with `mark` ("": any line); the command is then stopped."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tree)}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=tree,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if mark in line and line.strip():
                return time.monotonic() - began
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    raise SystemExit(f"startup: {' '.join(words)} printed no line with {mark!r}:\n{''.join(lines)}")


if __name__ == "__main__":
    main()
