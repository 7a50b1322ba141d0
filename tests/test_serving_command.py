"""`script/serve`, `python -m alpaca serve`: mistakes are answered, not traced back."""

import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import predict
from alpaca import address
from alpaca.errors import UserError
from alpaca.serving import command, weights

ROOT = Path(__file__).resolve().parent.parent


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alpaca", "serve", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_help_is_one_screen() -> None:
    done = serve("--help")
    assert done.returncode == 0
    assert 5 < done.stdout.count("\n") <= 40


def test_a_port_in_use_is_said(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve("--port", port, "--weights", str(tiny_model))
    assert done.returncode == 2
    assert f"Port {port} is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_weights_are_said(tmp_path: Path) -> None:
    done = serve("--weights", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere do not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_flag_wins_over_weights_that_cog_would_hand_over() -> None:
    exported = {"COG_WEIGHTS": "http://127.0.0.1:1/other.tar", "ALPACA_WEIGHTS": "older", "A": "1"}
    kept = {"ALPACA_WEIGHTS": str(Path("mine").resolve()), "A": "1"}
    assert command.named(exported, "mine") == kept
    assert command.named(exported, None) == exported


def test_the_engine_is_named_or_is_servers(tiny_model: Path) -> None:
    urls = "http://one:8000/v1,http://two:8000/v1"
    assert command.engine(None) == {}
    assert command.engine("vllm") == {"ALPACA_ENGINE": "vllm", "ALPACA_ENGINE_URL": ""}
    assert command.engine(urls) == {"ALPACA_ENGINE": "", "ALPACA_ENGINE_URL": urls}
    done = serve("--engine", "other", "--weights", str(tiny_model))
    assert done.returncode == 2
    assert "ALPACA_ENGINE is 'other'.\n  Set it to own or vllm" in done.stderr


def test_without_any_weights_the_three_ways_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        weights.locate(None, {}, tmp_path)
    for way in ("alpaca_out", "ALPACA_WEIGHTS", "COG_WEIGHTS"):
        assert way in str(refusal.value)


def test_the_order_of_the_three_ways(tmp_path: Path) -> None:
    for name in ("given", "named", "alpaca_out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    environment = {"ALPACA_WEIGHTS": "named"}
    assert weights.locate(Path("given"), environment, tmp_path).folder.name == "given"
    assert weights.locate(None, environment, tmp_path).folder.name == "named"
    assert weights.locate(None, {}, tmp_path).folder.name == "alpaca_out"


@pytest.mark.parametrize("arcname", [".", "llama"], ids=["flat", "in a folder"])
def test_a_tar_file_is_unpacked_once(tiny_model: Path, tmp_path: Path, arcname: str) -> None:
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.add(tiny_model, arcname)
    first = weights.locate(Path("weights.tar"), {}, tmp_path).folder
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in tiny_model.iterdir()}
    inode = (first / "config.json").stat().st_ino
    second = weights.locate(Path("weights.tar"), {}, tmp_path).folder
    assert (second / "config.json").stat().st_ino == inode


@pytest.mark.parametrize("given", ["{}/./weights.tar", "{}//weights.tar", "{}/folder/"])
def test_what_the_user_has_on_disk_stays_there(tmp_path: Path, given: str) -> None:
    (tmp_path / "weights.tar").touch()
    (tmp_path / "folder").mkdir()
    with predict.fetched(given.format(tmp_path)) as path:
        assert path is not None
        assert path.exists()
    assert path.exists()


def test_a_download_is_gone_once_it_was_used() -> None:
    with predict.fetched("data:application/x-tar;base64,YWJj") as path:
        assert path is not None
        assert path.read_bytes() == b"abc"
    assert not path.exists()
    with predict.fetched(None) as path:
        assert path is None


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_only_a_loopback_address_is_reached_by_this_machine_alone(host: str, own: bool) -> None:
    assert address.is_loopback(host) is own


def test_half_a_tar_file_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.add(tiny_model, ".")
    whole = (tmp_path / "weights.tar").read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole tar"):
        weights.locate(Path("half.tar"), {}, tmp_path)
    assert not [p for p in (tmp_path / ".cache" / "weights").iterdir() if p.name[0] != "."]
