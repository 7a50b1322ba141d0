"""What saving costs a run: the time of its steps with a checkpoint every few, and with none.

    git worktree add /tmp/before COMMIT
    python bench/saving.py [--before /tmp/before] [--rounds 1] [--steps 11] [--every 5]

SmolLM2-135M on two ranks (`weights/smollm2-135m`); each round runs train.py of both versions and
the run that never saves, one after the other. A run's time is that of its steps and of the saves
between them, without start and export. Last line: JSON, with the ratios to the run without saves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "weights/smollm2-135m"
DATA = ROOT / "data/seed_tasks.jsonl"


def main() -> None:
    """Run, print a line for each run and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, help="checkout of another version")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--accumulation", type=int, default=2)
    options = parser.parse_args()
    saving = ["--save_strategy=steps", f"--save_steps={options.every}"]
    ways = {"never": (ROOT, ["--save_strategy=no"]), "saving": (ROOT, saving)}
    if options.before:
        ways["before"] = (options.before.resolve(), saving)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (tree, flags) in ways.items():
            seconds = run(tree, [*flags, f"--max_steps={options.steps}"], options.accumulation)
            found[way].append(seconds)
            print(f"{way}: {seconds:.1f} s", flush=True)
    medians = {way: statistics.median(times) for way, times in found.items()}
    ratios = {f"{way}_vs_never": round(medians[way] / medians["never"], 3) for way in medians}
    print(json.dumps({**ratios, "seconds": found}))


def run(tree: Path, flags: list[str], accumulation: int) -> float:
    """Seconds of the steps of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--model_name_or_path={MODEL}", f"--data_path={DATA}", f"--output_dir={folder}"]
        words += [f"--gradient_accumulation_steps={accumulation}", *flags]
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"saving: the run failed:\n{(done.stdout + done.stderr)[-2000:]}")
        recorded = json.loads((Path(folder) / "passport.json").read_text())
    return float(recorded["result"]["seconds"])


if __name__ == "__main__":
    main()
