"""Complete or absent, wherever the writer is stopped."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca import atomic
from alpaca.errors import UserError, exit_code


class StoppedError(Exception):
    pass


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for text in ("old", "new"):
        with atomic.folder(final) as partial:
            assert partial.parent == tmp_path  # same disk, or the rename would not be atomic
            (partial / "sub").mkdir()
            (partial / "sub/weights").write_text(text)
        assert contents(tmp_path) == {"model/sub/weights": text}


def test_a_writer_that_fails_leaves_the_old_folder_untouched(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with atomic.folder(final) as partial:
        (partial / "weights").write_text("old")

    def stopped(*, keep_partial: bool) -> None:
        with atomic.folder(final, keep_partial=keep_partial) as partial:
            (partial / "weights").write_text("half")
            raise StoppedError

    with pytest.raises(StoppedError):
        stopped(keep_partial=False)
    assert contents(final) == {"weights": "old"}
    assert not atomic.partial_path(final).exists()  # it would keep a full disk full
    with pytest.raises(StoppedError):
        stopped(keep_partial=True)
    assert contents(final) == {"weights": "old"}
    with atomic.folder(final, keep_partial=True) as partial:
        assert contents(partial) == {"weights": "half"}  # a resuming writer finds it
    assert contents(final) == {"weights": "half"}


def test_a_partial_folder_is_cleared_unless_the_writer_resumes(tmp_path: Path) -> None:
    stale = atomic.partial_path(tmp_path / "model")
    stale.mkdir()
    (stale / "leftover").write_text("x")
    with atomic.folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("new")
    assert contents(tmp_path) == {"model/weights": "new"}


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    final, aside = tmp_path / "model", tmp_path / ".model.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    atomic.recover(final)
    assert contents(tmp_path) == {"model/weights": "old"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/log.json"
    atomic.write_text(path, "ส้ม")
    assert path.read_text(encoding="utf-8") == "ส้ม"
    os.chmod(path, 0o644)
    atomic.write_text(path, "second")
    assert contents(tmp_path) == {"new/folder/log.json": "second"}


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (None, 0, ""),
        (UserError("It broke.", "Fix it."), 2, "prog: error: It broke.\n  Fix it.\n"),
        (KeyboardInterrupt(), 130, "\nprog: stopped; run the same command again to resume\n"),
    ],
)
def test_exit_codes(
    raised: BaseException | None, code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        if raised:
            raise raised

    assert exit_code("prog", body) == code
    assert capsys.readouterr().err == shown


def test_bugs_keep_their_traceback() -> None:
    def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_code("prog", body)


def test_a_link_in_place_of_a_folder_is_replaced_and_what_it_names_is_kept(tmp_path: Path) -> None:
    kept, final = tmp_path / "kept", tmp_path / "final"
    kept.mkdir()
    (kept / "precious").touch()
    for _ in range(2):
        shutil.rmtree(final, ignore_errors=True)
        final.symlink_to(kept)
        atomic.partial_path(final).symlink_to(kept)
        with atomic.folder(final, keep_partial=True) as partial:
            assert list(partial.iterdir()) == []
            (partial / "new").touch()
        assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in kept.iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "kept"]


def test_removing_a_link_keeps_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("link", "dangling", "absent"):
        atomic.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_one_process_holds_a_lock_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path, busy = tmp_path / "lock", RuntimeError("busy")
    with atomic.locked(path, busy) as held:
        assert held
        with pytest.raises(RuntimeError, match="busy"), atomic.locked(path, busy):
            pass
        assert path.exists()
    assert not path.exists()
    holder = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 66), 2); os.kill(0, 9)"
    subprocess.run([sys.executable, "-c", holder, path], start_new_session=True, check=False)
    assert path.exists()  # killed before it could remove it
    with atomic.locked(path, busy) as held:
        assert held


def test_a_full_disk_is_a_sentence_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(number: int) -> Callable[[], None]:
        def body() -> None:
            raise OSError(number, "no space", "/data/x")

        return body

    assert exit_code("generate", fails(errno.ENOSPC)) == 2
    assert "generate: error: the disk is full (/data/x)" in capsys.readouterr().err
    with pytest.raises(OSError, match="no space"):
        exit_code("generate", fails(errno.EIO))


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with atomic.locked(tmp_path / "lock", RuntimeError("busy")) as held:
        assert not held
