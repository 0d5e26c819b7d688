"""Where `qtool bench quantize` puts its files, and what kind of place that is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qtool.doctor.machine import available_memory_bytes
from qtool.errors import Option, QtoolError

SHARED_MEMORY: Final = Path("/dev/shm")
MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "ramfs")
# What must stay free for the programs themselves where files take memory.
PROGRAMS_BYTES: Final = 4 << 30
_MARGIN: Final = 1.02  # file system overhead, small files


@contextmanager
def open_work_folder(parent: Path | None, num_bytes: int) -> Iterator[Path]:
    """Yield a new folder with room for `num_bytes`; whatever happens, it is removed in the end.

    Args:
        parent: where to make it; None means /dev/shm if there is room, else the folder for
            temporary files.

    Raises:
        QtoolError: no_space, with what is needed and what is free; not_found.
    """
    if parent is None:
        has_room = SHARED_MEMORY.is_dir() and free_bytes(SHARED_MEMORY) >= num_bytes * _MARGIN
        parent = SHARED_MEMORY if has_room else Path(tempfile.gettempdir())
    if not parent.is_dir():
        raise QtoolError(
            (Option("work_dir", parent), ": there is no such folder"),
            kind="not_found",
            hint="create it, or name another one",
        )
    needed, free = int(num_bytes * _MARGIN), free_bytes(parent)
    if free < needed:
        raise QtoolError(
            f"{parent}: the measurement needs {needed:,} bytes, {free:,} are free",
            kind="no_space",
            hint=(
                "name a larger place with ",
                Option("work_dir"),
                ", or take a smaller ",
                Option("model_shape"),
            ),
        )
    with tempfile.TemporaryDirectory(prefix="qtool-bench-", dir=parent) as folder:
        yield Path(folder)


def free_bytes(folder: Path) -> int:
    """What files in `folder` can take; in memory only as much as leaves the programs theirs."""
    free = shutil.disk_usage(folder).free
    if file_system(folder) in MEMORY_FILE_SYSTEMS:
        free = min(free, max(0, available_memory_bytes()[0] - PROGRAMS_BYTES))
    return free


def describe_storage(folder: Path) -> str:
    """For the result: what lies below the files."""
    name = file_system(folder)
    if name in MEMORY_FILE_SYSTEMS:
        return f"memory-backed files ({name})"
    return f"{name}, read before: in the page cache as far as it has room"


def file_system(folder: Path) -> str:
    """The type of the file system that `folder` lies on, as Linux names it."""
    place, found = folder.resolve(), ("", "unknown file system")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        if place.is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]
