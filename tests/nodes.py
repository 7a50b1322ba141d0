"""Two hosts on one machine: network namespaces joined by a virtual cable, torchrun in each.

Each host has its own network, host name and /etc/hosts, as two machines have, and the same disk, as
machines of one cluster have. Needs root.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("node-a", "node-b")
CABLE = "eth0"  # the same on both, so that both can be given the very same command
# A lost host is declared dead after 3 s instead of 15.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3"
# As deploy/README.md has it: with the shared store, torch 2.13 lets no host join a second time.
NETWORK = {"GLOO_SOCKET_IFNAME": CABLE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STARTED: list["Job"] = []


@dataclass
class Job:
    """A process that writes to a log file."""

    process: "subprocess.Popen[str]"
    log: Path

    @property
    def said(self) -> str:
        """What it and its ranks have printed so far."""
        return self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The processes below it; torchrun puts each into a session of its own."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """End it and its ranks at once, as a power cut does."""
        for process in [*self.ranks(), self.process]:
            process.kill()
        self.process.wait()

    def succeed(self) -> None:
        """Wait for its end; it must be a good one."""
        assert self.process.wait(timeout=240) == 0, self.said


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    namespace: str
    hosts: Path

    def start(self, words: list[str], log: Path) -> Job:
        """Run a command here."""
        inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        shell = ["unshare", "--uts", "sh", "-c", inside, "sh", str(self.hosts), self.name]
        return start(["ip", "netns", "exec", self.namespace, *shell, *words], log)

    def plug(self, state: str) -> None:
        """Pull the cable ("down") or put it back ("up")."""
        network("-n", self.namespace, "link", "set", CABLE, state)


def network(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make both hosts, joined; skips the test where that is not allowed."""
    spaces = [f"alpaca-{os.getpid()}-{name}" for name in NAMES]
    hosts = folder / "hosts"
    lines = [f"10.77.0.{number} {name}" for number, name in enumerate(NAMES, start=1)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    try:
        try:
            for space in spaces:
                network("netns", "add", space)
            cable = ["link", "add", CABLE, "netns", spaces[0], "type", "veth"]
            network(*cable, "peer", "name", CABLE, "netns", spaces[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        for number, space in enumerate(spaces, start=1):
            network("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                network("-n", space, "link", "set", device, "up")
        one, other = (Host(*pair, hosts) for pair in zip(NAMES, spaces, strict=True))
        yield one, other
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def start(words: list[str], log: Path) -> Job:
    """Run a command on this machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if words[0] == "ip":
        environment |= NETWORK
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, stdout=file, stderr=subprocess.STDOUT
        )
    STARTED.append(Job(process, log))
    return STARTED[-1]


def end_all() -> None:
    """Kill what a failed test left running."""
    for job in STARTED:
        if job.process.poll() is None:
            job.kill()
    STARTED.clear()


def torchrun(*flags: str) -> list[str]:
    """torchrun with `flags`."""
    return [sys.executable, "-m", "torch.distributed.run", *flags]


def many_nodes() -> list[str]:
    """The launcher of each of two hosts with one rank each; node-a keeps the rendezvous."""
    return torchrun(
        "--nnodes=2",
        "--nproc_per_node=1",
        "--max_restarts=3",
        "--rdzv_id=job",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={NAMES[0]}:29400",
        f"--rdzv_conf={RENDEZVOUS}",
    )


def wait_until(reached: Callable[[], bool], *jobs: Job) -> None:
    """Wait for something that `jobs` do; fails when one of them ends before."""
    while not reached():
        for job in jobs:
            assert job.process.poll() is None, job.said
        time.sleep(0.02)


def losses(out: Path) -> list[float]:
    """The losses in a run's log, of which no step may be missing or double."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]
