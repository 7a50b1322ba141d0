"""`python -m alpaca doctor`: one line per check, green or red, with the remedy.

The ranks that test the devices start first and import torch while the other checks run.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alpaca.doctor import devices, host
from alpaca.doctor.finding import Finding
from alpaca.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MASTER_PORT = 29500  # torchrun's default for the rendezvous of its ranks


def parser() -> argparse.ArgumentParser:
    """The command line of `doctor`."""
    made = argparse.ArgumentParser(
        description="Check this machine: software, devices, memory, disk, network, limits.",
        epilog="Exit code 0: all green. 2: something is red; its line says what to do.",
    )
    made.add_argument(
        "--folder",
        type=Path,
        default=Path("alpaca_out"),
        metavar="FOLDER",
        help="where models will be written (%(default)s)",
    )
    made.add_argument(
        "--disk", type=float, default=5, metavar="GB", help="space needed (%(default)s)"
    )
    made.add_argument("--ram", type=float, default=2, metavar="GB", help="RAM needed (%(default)s)")
    made.add_argument(
        "--shm",
        type=Path,
        default=Path("/dev/shm"),
        metavar="FOLDER",
        help="shared memory (%(default)s)",
    )
    made.add_argument("--port", type=int, default=5000, help="the server's port (%(default)s)")
    made.add_argument(
        "--no-image", action="store_true", help="skip Docker and Cog: no image will be built"
    )
    made.add_argument(
        "--rehearse",
        action="store_true",
        help="also convert, train, kill, resume, export, serve and ask, with a tiny model",
    )
    return made


def run(arguments: argparse.Namespace) -> None:
    """Print the report; raise UserError (exit code 2) when a check is red."""
    found = []
    for finding in checks(arguments):
        print(finding.line(), flush=True)
        found.append(finding)
    if arguments.rehearse:
        for finding in rehearsed():
            print(finding.line(), flush=True)
            found.append(finding)
    red = [finding.name for finding in found if not finding.ok]
    if red:
        raise UserError(
            f"{len(red)} of {len(found)} checks are red: {', '.join(red)}.",
            "Each line above says what to do.",
        )
    print(f"All {len(found)} checks are green.")


def rehearsed() -> Iterator[Finding]:
    """The rehearsal's findings; it imports torch and transformers, which the checks do not need."""
    try:
        from alpaca.doctor.rehearsal import rehearse
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        remedy = "Install the packages again: ./script/setup"
        yield Finding("rehearsal", False, f"cannot start: {error}", remedy)
    else:
        yield from rehearse()


def checks(arguments: argparse.Namespace) -> list[Finding]:
    """All findings except the rehearsal's."""
    driver = devices.driver()
    ranks = driver.gpus or (1 if driver.fault else devices.CPU_RANKS)
    with ThreadPoolExecutor(max_workers=1) as pool:
        reports = pool.submit(devices.ask, ranks)
        found = [
            host.python(),
            host.pins(ROOT / "requirements.txt"),
            host.memory(arguments.ram * 1e9),
            *([] if driver.gpus else [host.allocator()]),
            host.disk(arguments.folder, arguments.disk * 1e9),
            host.shared_memory(arguments.shm, ranks, driver.gpus > 0),
            host.port(arguments.port, "--port"),
            host.port(MASTER_PORT, "torchrun --master_port"),
            host.open_files(),
            host.curl(),
            *([] if arguments.no_image else [host.docker(), host.cog()]),
        ]
        return [*found, *devices.findings(reports.result(), driver)]
