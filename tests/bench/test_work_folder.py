"""Files of a measurement find room, and are gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.bench import work_folder
from qtool.bench.work_folder import describe_storage, file_system, free_bytes, open_work_folder
from qtool.errors import QtoolError

HAS_SHM = "\ntmpfs /dev/shm tmpfs" in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_removed_whatever_happens(tmp_path, error):
    with pytest.raises(error), open_work_folder(tmp_path, 1000) as folder:
        assert folder.parent == tmp_path
        (folder / "source").mkdir()
        (folder / "source" / "weights").write_bytes(b"12345")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with (
        pytest.raises(QtoolError, match=r"bytes, .* are free") as caught,
        open_work_folder(tmp_path, 1 << 60),
    ):
        pass
    assert caught.value.kind == "no_space" and "work_dir" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path):
    with (
        pytest.raises(QtoolError, match="no such folder") as caught,
        open_work_folder(tmp_path / "nowhere", 1),
    ):
        pass
    assert caught.value.kind == "not_found"


def test_without_a_choice_memory_is_taken_if_it_has_room(tmp_path, monkeypatch):
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(work_folder, "SHARED_MEMORY", shared)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temporary))
    free = {shared: 2000, temporary: 10**6}
    monkeypatch.setattr(work_folder, "free_bytes", lambda folder: free[folder])
    with open_work_folder(None, 1900) as folder:
        assert folder.parent == shared
    with open_work_folder(None, 1990) as folder:  # with the margin it is too much
        assert folder.parent == temporary


def test_files_in_memory_leave_room_for_the_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "available_memory_bytes", lambda: (5 << 30, 8 << 30))
    monkeypatch.setattr(work_folder, "file_system", lambda folder: "tmpfs")
    assert free_bytes(tmp_path) <= 1 << 30
    assert "memory-backed" in describe_storage(tmp_path)
    monkeypatch.setattr(work_folder, "file_system", lambda folder: "ext4")
    assert "ext4" in describe_storage(tmp_path) and "page cache" in describe_storage(tmp_path)


@pytest.mark.skipif(not HAS_SHM, reason="/dev/shm is no tmpfs here")
def test_the_file_system_is_that_of_the_nearest_mount():
    assert file_system(work_folder.SHARED_MEMORY) == "tmpfs"
    assert file_system(work_folder.SHARED_MEMORY / "deep" / "below") == "tmpfs"
