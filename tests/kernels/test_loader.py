"""Compiled kernels are kept on disk, whole, and under a name that says all they depend on."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("cupy", exc_type=ImportError)

from cupy_kernels import loader

DEFINES = {"SOURCE": "Bf16"}


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("QTOOL_KERNEL_CACHE", str(folder))
    return folder


def image_of(defines=DEFINES, target="sm_90"):
    return loader._cached_image("count_nonfinite", defines, target)


def test_a_kernel_is_compiled_once(cache_folder, monkeypatch):
    path = image_of()
    assert path.parent == cache_folder and path.read_bytes().startswith(b"\x7fELF")
    monkeypatch.setattr(loader, "compile_kernel", None)
    assert image_of() == path


def test_what_it_is_made_from_decides_its_name(monkeypatch):
    paths = {image_of(), image_of({"SOURCE": "F16"}), image_of(target="sm_80")}
    monkeypatch.setattr(
        loader, "COMPILE_OPTIONS", (*loader.COMPILE_OPTIONS, "--generate-line-info")
    )
    paths.add(image_of())
    loader._headers.cache_clear()
    monkeypatch.setattr(loader, "code_tables_header", lambda: "#pragma once\n")
    paths.add(image_of())
    loader._headers.cache_clear()
    assert len(paths) == 5


def test_nothing_half_written_is_left(cache_folder):
    image_of()
    assert [path.suffix for path in cache_folder.iterdir()] == [".cubin"]


def test_of_a_write_that_fails_nothing_is_left(cache_folder, monkeypatch):
    """On a full disk each kernel of each run would add a file."""
    replace = Path.replace

    def replace_elsewhere(partial, path):
        if path.parent == cache_folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(partial, path)

    monkeypatch.setattr(Path, "replace", replace_elsewhere)
    path = image_of()
    assert path.read_bytes().startswith(b"\x7fELF") and path.parent != cache_folder
    assert not [*cache_folder.iterdir()]


def test_without_a_place_for_the_cache_the_process_has_its_own(cache_folder, monkeypatch):
    cache_folder.write_text("a file where the folder should be")
    path = image_of()
    assert cache_folder not in path.parents
    assert path.read_bytes().startswith(b"\x7fELF")


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("QTOOL_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loader.cache_folder() == tmp_path / "qtool/kernels"


@pytest.mark.parametrize(
    ("target", "waits"),
    [
        ("sm_86", False),
        ("compute_80", False),
        ("sm_90", True),
        ("compute_90", True),
        ("sm_120", True),
    ],
)
def test_kernels_for_older_gpus_do_not_wait_for_the_launch_before(monkeypatch, target, waits):
    monkeypatch.setenv("QTOOL_KERNEL_TARGET", target)
    assert loader.kernels_wait() is waits
