"""One rank of the doctor's process group: reports what torch sees, and runs an all-reduce.

alpaca/doctor/devices.py starts one process per device, with RANK, WORLD_SIZE and the path of the
file that is their rendezvous. Prints a JSON object before the all-reduce and one after it.
"""

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NUMBERS = 1 << 20  # elements of the all-reduce: 4 MB


def main() -> None:
    """Join the group, run an all-reduce, and print the reports."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    facts = seen(rank)
    print(json.dumps(facts | {"sum": None}), flush=True)  # printed even if the all-reduce hangs
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{sys.argv[1]}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=15),
    )
    try:
        numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        total = float(numbers[-1].item())
        facts |= {"sum": total, "seconds": time.perf_counter() - started}
    finally:
        dist.destroy_process_group()
    print(json.dumps(facts), flush=True)


def seen(rank: int) -> dict[str, Any]:
    """What torch reports about itself and about this rank's device."""
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(rank)
    others = [i for i in range(torch.cuda.device_count()) if i != rank]
    return facts | {
        "name": properties.name,
        "memory": properties.total_memory,
        "free": torch.cuda.mem_get_info(rank)[0],
        # is_bf16_supported() is true where bf16 is emulated; tensor cores have it since 8.0.
        "capability": [properties.major, properties.minor],
        "peers": [i for i in others if torch.cuda.can_device_access_peer(rank, i)],
        "others": others,
    }


if __name__ == "__main__":
    main()
