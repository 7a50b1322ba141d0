"""Tar files of weights: whole, damaged, altered and hostile ones."""

import gzip
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca import passport
from alpaca.errors import UserError
from alpaca.serving import archives, weights


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a passport."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(tiny_model, folder)
    passport.write(folder, "train")
    return folder


def pack(model: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(model, ".")
    return path


def located(path: Path) -> Path:
    return weights.locate(path, {}, path.parent).folder


def left(root: Path) -> list[str]:
    """What is in the cache."""
    cache = root / weights.CACHE
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_kind_of_archive_gives_the_folder_back(
    mode: str, model: Path, tmp_path: Path
) -> None:
    folder = located(pack(model, tmp_path / "weights.tar", mode))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_damage_is_found_or_harmless(mode: str, model: Path, tmp_path: Path) -> None:
    """50 flipped bytes and 20 cuts: refused, or exactly the packed files."""
    whole = pack(model, tmp_path / "whole.tar", mode).read_bytes()
    right = {path.name: path.read_bytes() for path in model.iterdir()}
    found = {"refused": 0, "harmless": 0}
    for index in range(70):
        place = random.Random(index).randrange(len(whole))
        damaged = tmp_path / "damaged.tar"
        flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        damaged.write_bytes(whole[:place] if index >= 50 else flipped)
        try:
            folder = located(damaged)
        except UserError:
            found["refused"] += 1
            assert left(tmp_path) == []
            continue
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == right
        found["harmless"] += 1
        shutil.rmtree(tmp_path / weights.CACHE)
    assert found["refused"] >= (60 if mode == "w:gz" else 40)


def test_large_weights_are_compared_with_the_passport(model: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(model, altered)
    tensors = load_file(altered / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, altered / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors differs from what the passport"):
        located(pack(altered, tmp_path / "weights.tar"))
    assert left(tmp_path) == []


def test_a_changed_cache_is_unpacked_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = pack(model, tmp_path / "weights.tar")
    folder = located(tar)
    (folder / "model.safetensors").write_bytes(b"other")
    again = located(tar)
    assert "was changed since" in capsys.readouterr().out
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    located(tar)
    assert "was changed" not in capsys.readouterr().out


def test_a_copied_cache_is_used_if_it_matches_its_passport(model: Path, tmp_path: Path) -> None:
    tar = pack(model, tmp_path / "weights.tar")
    folder = located(tar)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    for record in folder.parent.glob(".*.json"):
        record.unlink()
    inode = (folder / "config.json").stat().st_ino
    assert (located(tar) / "config.json").stat().st_ino == inode


def test_a_server_waits_while_another_unpacks_the_same_archive(model: Path, tmp_path: Path) -> None:
    tar = pack(model, tmp_path / "weights.tar")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: located(tar), range(4)))
    assert len(folders) == 1
    assert len(left(tmp_path)) == 2  # the folder and its record


def member(name: str, **settings: object) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    for key, value in settings.items():
        setattr(made, key, value)
    return made, bytes(made.size if made.isreg() else 0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: member("../outside", size=3), "outside"),
        (lambda: member("link", type=tarfile.SYMTYPE, linkname="config.json"), "is a link"),
        (lambda: member("hard", type=tarfile.LNKTYPE, linkname="config.json"), "link"),
        (lambda: member("device", type=tarfile.CHRTYPE), "special file"),
    ],
)
def test_what_no_model_holds_is_called_what_it_is(
    make: Callable[[], tuple[tarfile.TarInfo, bytes]], reason: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        info, content = make()
        archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=f"is not an archive of a model: .*{reason}"):
        located(tmp_path / "weights.tar")
    assert left(tmp_path) == []
    assert not (tmp_path / "outside").exists()


def test_a_negative_size_does_not_raise_the_limit(tmp_path: Path) -> None:
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(-(1 << 60), 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "weights.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UserError):
        located(tmp_path / "weights.tar")
    assert left(tmp_path) == []


def test_an_archive_that_would_fill_the_disk_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    with gzip.open(tmp_path / "weights.tar.gz", "wb") as packed:
        info = tarfile.TarInfo("model.safetensors")
        info.size = 100 << 20
        packed.write(info.tobuf())
        for _ in range(100):
            packed.write(bytes(1 << 20))
    with pytest.raises(UserError, match="more than 10 times its size"):
        located(tmp_path / "weights.tar.gz")
    assert left(tmp_path) == []


def test_a_planted_link_is_removed_and_not_followed(model: Path, tmp_path: Path) -> None:
    """In place of the partial folder, and of the unpacked one."""
    tar = pack(model, tmp_path / "weights.tar")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("1")
    name = located(tar).name
    cache = tmp_path / weights.CACHE
    shutil.rmtree(cache / name)
    os.symlink(kept, cache / f".{name}.partial")
    os.symlink(kept, cache / name)
    folder = located(tar)
    assert (kept / "precious").read_text() == "1"
    assert not folder.is_symlink()
    assert json.loads((folder / "config.json").read_text())
