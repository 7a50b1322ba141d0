"""Instructions a second through the whole of `alpaca diversity`, on all cores.

    .venv/bin/python bench/diversity.py [--instructions 52000]

The instructions are the seed tasks' own, a third of their words replaced (see novelty.py). Timed
from the command to its finished HTML file: loading spaCy in every process, parsing, the ROUGE-L
distribution of 2,000 sampled instructions, the plot. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from novelty import varied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", type=int, default=52_000)
    arguments = parser.parse_args()
    records = [{"instruction": text, "output": "x"} for text in varied(arguments.instructions)]
    with tempfile.TemporaryDirectory() as folder:
        data, plot = Path(folder, "data.json"), Path(folder, "plot.html")
        data.write_text(json.dumps(records))
        command = [sys.executable, "-m", "alpaca", "diversity", str(data), "-o", str(plot)]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        assert plot.stat().st_size > 10_000
    result = {
        "instructions": len(records),
        "seconds": round(seconds, 1),
        "per_second": round(len(records) / seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
