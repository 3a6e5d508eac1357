"""Writing files whole: what is flushed before what, and what is left where the disk refuses."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from synthward.engine.files import replace_synced, sync_file, sync_path, write_synced
from tests.test_architecture import ROOMS, ROOT


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, str, int]]:
    """What was flushed and renamed, in order: what, the file's name, its size on the disk at that moment."""
    done: list[tuple[str, str, int]] = []
    flush, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        found = os.fstat(descriptor)
        done.append(("flush", name, 0 if stat.S_ISDIR(found.st_mode) else found.st_size))
        flush(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append(("rename", self.name, self.stat().st_size))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    return done


def test_a_file_is_on_the_disk_whole_before_it_has_its_name(tmp_path, told):
    target, temporary = tmp_path / "file", tmp_path / "file.tmp"
    target.write_bytes(b"old")
    replace_synced(target, b"new one", temporary)
    assert told == [("flush", "file.tmp", 7), ("rename", "file.tmp", 7)]
    assert target.read_bytes() == b"new one" and not temporary.exists()


def test_what_stands_in_a_buffer_is_flushed_too(tmp_path, told):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"12345")
        sync_file(file)
        assert told == [("flush", "file", 5)]


def test_folders_and_files_of_others_are_flushed_by_their_path(tmp_path, told):
    (tmp_path / "file").write_bytes(b"123")
    sync_path(tmp_path / "file")
    sync_path(tmp_path)
    assert told == [("flush", "file", 3), ("flush", tmp_path.name, 0)]
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    sync_path(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_of_the_user_s_mask(tmp_path, mask):
    before = os.umask(mask)
    try:
        replace_synced(tmp_path / "file", b"x", tmp_path / "file.tmp")
        write_synced(tmp_path / "other", b"x", is_new=True)
    finally:
        os.umask(before)
    for name in ("file", "other"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_a_file_that_may_not_be_there_is_left_as_it_is(tmp_path):
    target, temporary = tmp_path / "file", tmp_path / "file.tmp"
    temporary.write_bytes(b"of someone else")
    with pytest.raises(FileExistsError):
        replace_synced(target, b"mine", temporary, is_new=True)
    assert temporary.read_bytes() == b"of someone else" and not target.exists()
    replace_synced(target, b"mine", temporary)
    assert target.read_bytes() == b"mine"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_synced(target, b"new", tmp_path / "file.tmp")
    assert target.read_bytes() == b"old"


def test_nobody_else_flushes_files():
    """But the chain, which writes to descriptors that it keeps open and locked."""
    found = {
        str(file.relative_to(ROOT))
        for folder in ROOMS
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"\bfsync\b", file.read_text())
    }
    assert found == {"engine/files.py", "engine/chain.py"}
