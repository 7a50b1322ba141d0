"""Training on a CPU starts again with tcmalloc where it is installed, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca import heap
from alpaca.doctor import host

SHOW = """
import os, sys
from alpaca import heap
from alpaca.doctor import host
heap.GPU = __import__("pathlib").Path(sys.argv[1])
heap.LIBRARY = sys.argv[2]
heap.replace()
maps = open("/proc/self/maps").read()
print("tcmalloc" in maps, heap.replaced(), sys.argv[1:], os.getpid())
"""
NOWHERE = Path("/nowhere")
needs_tcmalloc = pytest.mark.skipif(not heap.installed(), reason="tcmalloc is not installed")


def shown(gpu: Path = NOWHERE, library: str = heap.LIBRARY, **environment: str) -> tuple[str, int]:
    """What the program prints, and its number as its parent knows it."""
    bare = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-c", SHOW, str(gpu), library, "a b"]
    with subprocess.Popen(
        command,
        env={**bare, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as started:
        told, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (0, "")
    return told.strip(), started.pid


@needs_tcmalloc
def test_a_program_starts_again_with_tcmalloc_as_the_same_process_with_its_words() -> None:
    told, number = shown()
    assert told == f"True True {[str(NOWHERE), heap.LIBRARY, 'a b']} {number}"


@pytest.mark.parametrize(
    ("gpu", "library", "environment"),
    [
        (Path("/dev/null"), heap.LIBRARY, {}),
        (NOWHERE, "libnowhere.so.4", {}),
        (NOWHERE, heap.LIBRARY, {heap.SWITCH: "0"}),
        (NOWHERE, heap.LIBRARY, {"LD_PRELOAD": ""}),
    ],
)
def test_it_stays_as_it_is_beside_a_gpu_without_the_library_and_where_told(
    gpu: Path, library: str, environment: dict[str, str]
) -> None:
    assert shown(gpu, library, **environment)[0].startswith("False False")


@needs_tcmalloc
@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_doctor_says_whether_training_will_use_it(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv(heap.SWITCH, switch)
    monkeypatch.setattr(heap, "GPU", NOWHERE)
    assert ("keeps it out" in host.allocator().message) == (switch == "0")


@needs_tcmalloc
def test_a_program_that_came_through_standard_input_runs_once() -> None:
    """Started again it would find its input read, and do nothing."""
    bare = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    program = (
        f"from alpaca import heap\nheap.GPU = heap.Path('{NOWHERE}')\nheap.replace()\nprint(1)"
    )
    for words in (["-"], []):
        done = subprocess.run(
            [sys.executable, *words],
            input=program,
            env=bare,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "1\n"
