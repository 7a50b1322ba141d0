"""`python -m alpaca doctor`: each check is driven red by the thing it looks for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.doctor import devices, host
from alpaca.doctor.devices import Driver, Rank

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"torch": "2.13.0", "cuda": "13.0", "name": "A100", "memory": 42 * 10**9,
        "free": 41 * 10**9, "capability": [8, 0], "peers": [1], "others": [1], "sum": 3.0,
        "seconds": 0.01}  # fmt: skip


def doctor(*flags: object, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "alpaca", "doctor", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def in_namespace(script: str) -> str:
    """Run a script where it may mount file systems that nobody else sees."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(code: str) -> str:
    return f"{sys.executable} -c 'from pathlib import Path; from alpaca.doctor import host; {code}'"


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="this machine allows no mount namespaces",
)
def test_a_small_a_full_and_a_read_only_file_system_are_red(tmp_path: Path) -> None:
    shown = in_namespace(
        f"mount -t tmpfs -o size=4m none {tmp_path} && "
        + python(
            f'print(host.disk(Path("{tmp_path}"), 1e6)); '
            f'print(host.shared_memory(Path("{tmp_path}"), 2, False))'
        )
        + f" && mount -t tmpfs -o ro,size=400m none {tmp_path} && "
        + python(f'print(host.disk(Path("{tmp_path}"), 1e6))')
    ).splitlines()
    assert len(shown) == 3
    assert all("ok=False" in line for line in shown), shown
    assert "0.00 GB free" in shown[0]
    assert "--shm-size" in shown[1]
    assert "can't be written" in shown[2]


def test_a_good_disk_is_green_and_its_speed_is_told(tmp_path: Path) -> None:
    found = host.disk(tmp_path, 1e6)
    assert found.ok
    assert "MB/s" in found.message
    assert list(tmp_path.iterdir()) == []


def test_a_low_file_limit_is_red_and_a_higher_one_green() -> None:
    for limit, word in ((64, "ok=False"), (2048, "ok=True")):
        script = f"ulimit -S -n {limit}; " + python("print(host.open_files())")
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert word in done.stdout
        assert "ulimit -n" in done.stdout


def test_a_taken_port_is_red_until_it_is_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.getsockname()[1]
        found = host.port(number, "--port")
        assert not found.ok
        assert f"--port {number + 1}" in found.remedy
    assert host.port(number, "").ok
    assert not host.port(70000, "").ok


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try what others may not")
def test_a_port_for_root_alone_is_red_to_others() -> None:
    code = "import os; from alpaca.doctor import host; os.setuid(65534); print(host.port(80, ''))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ok=False, message='is reserved for root'" in done.stdout, done.stderr


def test_an_old_python_and_missing_shared_memory_are_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.python().ok
    monkeypatch.setattr(host.platform, "python_version_tuple", lambda: ("3", "10", "2"))
    assert not host.python().ok
    assert not host.shared_memory(tmp_path / "shm", 1, False).ok


@pytest.mark.parametrize(
    ("answer", "visible", "gpus", "fault"),
    [
        ("echo 580.1; echo 580.1; echo 580.1", None, 3, ""),
        ("echo 580.1; echo 580.1; echo 580.1", "2,0", 2, ""),
        ("echo 580.1; echo 580.1; echo 580.1", "1,7,0", 1, ""),
        ("echo 580.1; echo 580.1; echo 580.1", "", 0, ""),
        ("echo 580.1; echo 580.1; echo 580.1", "-1", 0, ""),
        ("echo Failed to initialize NVML: Driver/library version mismatch; exit 18", None, 0,
         "version mismatch"),
    ],
)  # fmt: skip
def test_a_driver_is_asked_for_the_cards_a_program_may_use(
    answer: str,
    visible: str | None,
    gpus: int,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices.driver()
    assert (found.gpus, fault in found.fault, bool(fault)) == (gpus, True, bool(found.fault))
    if fault:
        assert not devices.cuda({"torch": "2.13.0", "cuda": "13.0"}, found).ok


def test_devices_of_a_driver_without_its_program_are_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.driver(tmp_path).fault == ""
    (tmp_path / "nvidia0").touch()
    found = devices.driver(tmp_path)
    assert "nvidia0 exists, but nvidia-smi is missing" in found.fault
    assert not devices.cuda({"torch": "2.13.0", "cuda": "13.0"}, found).ok


def test_programs_that_are_missing_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outside = tmp_path / "no-dockerenv"
    for found in (host.curl(), host.docker(outside), host.cog(outside)):
        assert not found.ok
        assert "not on PATH" in found.message
        assert found.remedy


@pytest.mark.parametrize(
    ("commands", "ok", "message"),
    [
        ("  build    B\n  exec   E\n  run   R\n", True, "`cog exec CMD`"),
        ("  build    B\n  predict   P\n  run   R\n", True, "`cog run CMD`"),
        ("  sail    S\n", False, "cog run CMD"),
    ],
)
def test_what_this_cog_calls_its_commands_is_told(
    commands: str, ok: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cog"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "cog version 9" || printf "{commands}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = host.cog(tmp_path / "no-dockerenv")
    assert (found.ok, message in found.message) == (ok, True)


def test_a_docker_without_an_engine_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\necho 'Cannot connect' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not host.docker(tmp_path / "no-dockerenv").ok


def test_a_package_of_another_version_is_named(tmp_path: Path) -> None:
    assert host.pins(ROOT / "requirements.txt").ok
    (tmp_path / "requirements.txt").write_text("numpy==0.1\nnosuchpackage==1.0\n")
    found = host.pins(tmp_path / "requirements.txt")
    assert not found.ok
    assert "pinned 0.1" in found.message
    assert "nosuchpackage absent" in found.message


def test_too_little_memory_is_red() -> None:
    assert host.memory(1.0).ok
    assert not host.memory(1e15).ok


def test_ranks_that_die_or_add_wrong_are_named() -> None:
    died = devices.ask(2, ("-c", "import os, sys; sys.exit('no device ' + os.environ['RANK'])"))
    assert [rank.errors for rank in died] == ["no device 0", "no device 1"]
    (torch,) = devices.findings(died, Driver())
    assert not torch.ok
    assert "no device 0" in torch.message
    wrong = [Rank(GOOD, ""), Rank(GOOD | {"sum": 2.0}, "RuntimeError: unreachable")]
    found = devices.all_reduce(wrong)
    assert not found.ok
    assert "rank(s) [1] failed: RuntimeError: unreachable" in found.message


def test_cards_drivers_and_peers_are_judged() -> None:
    assert all(
        found.ok
        for found in devices.findings(
            [Rank(GOOD, ""), Rank(GOOD | {"peers": [0], "others": [0]}, "")], Driver("580", 2)
        )
    )
    old = devices.gpu(0, GOOD | {"name": "T4", "capability": [7, 5]})
    assert not old.ok
    assert "bf16 only emulated" in old.message
    assert not devices.gpu(0, GOOD | {"free": 10**9}).ok
    assert not devices.peers([GOOD | {"peers": []}]).ok
    assert not devices.peers([GOOD, {}]).ok
    assert not devices.cuda({"torch": "2.13.0+cpu", "cuda": None}, Driver("580", 1)).ok
    assert not devices.cuda({"torch": "2.13.0", "cuda": "13.0"}, Driver("470", 1)).ok


def test_the_doctor_tells_a_line_a_check_and_exits_2_on_red(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.getsockname()[1]
        code, shown = doctor("--folder", tmp_path, "--disk", 0.2, "--port", number)
    assert code == 2, shown
    assert f"BAD  port {number}" in shown
    assert "ok   all-reduce   2 ranks added" in shown
    assert "ok   Python" in shown
    assert f"port {number}" in shown.splitlines()[-2]


def test_a_package_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('libnothing.so: not found')")
    where = ["--folder", tmp_path, "--disk", 0.2, "--port", 5999]
    code, shown = doctor(*where, "--rehearse", PYTHONPATH=str(tmp_path))
    assert code == 2, shown
    assert "BAD  rehearsal    cannot start: libnothing.so: not found" in shown
    assert "-> Install the packages again" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_rehearsal_goes_the_whole_way(tmp_path: Path) -> None:
    where = ["--folder", tmp_path, "--disk", 0.2, "--port", 5999]
    code, shown = doctor("--rehearse", "--no-image", *where)
    stages = (
        "convert",
        "train, kill",
        "resume",
        "verify",
        "serve",
        "predict",
        "stream",
        "rehearsal",
    )
    for stage in stages:
        assert f"ok   {stage}" in shown, shown
    assert code == 0
    assert "All " in shown
