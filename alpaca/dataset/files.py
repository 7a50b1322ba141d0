"""The files that a run writes next to its journal: data set, dropped tasks, nearest neighbours.

Each is written whole, from the journal's content alone.
"""

import json
from pathlib import Path

from alpaca import atomic
from alpaca.dataset.journal import Entry, side_file
from alpaca.dataset.pool import Pool
from alpaca.dataset.reply import Task


def write(output: Path, pool: Pool, wanted: int) -> None:
    """Write the data set and its two side files from the pool; no file if no task is kept."""
    if not pool.kept:
        return
    kept = pool.kept[:wanted]
    records = [{field: item[field] for field in Task._fields} for item in kept]
    neighbours = [
        {
            "index": index,
            "request": item["request"],
            "nearest": [
                {"score": score, "instruction": pool.tasks[number].instruction}
                for number, score in item["nearest"]
            ],
        }
        for index, item in enumerate(kept)
    ]
    atomic.write_text(side_file(output, "neighbours"), _lines(neighbours))
    atomic.write_text(side_file(output, "dropped"), _lines(pool.dropped))
    atomic.write_text(output, json.dumps(records, indent=4, ensure_ascii=False) + "\n")


def _lines(items: list[Entry]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)
