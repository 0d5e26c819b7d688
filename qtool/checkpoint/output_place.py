"""OUT as a place, whatever is written there: whether it can be, its lock, JSON, bytes on disk.

Knows neither journals nor saves; those are of who writes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtool.errors import Option, QtoolError

WORK_FOLDER = ".qtool"  # in OUT while it is being written, and after an interruption


def refuse_file(path: Path) -> None:
    """Raise QtoolError (usage) where OUT is there and is no folder."""
    if path.exists() and not path.is_dir():
        raise QtoolError(
            f"{path} is a file, expected a folder to write", kind="usage", hint="choose another -o"
        )


def require_writable(path: Path) -> None:
    """Try it, where permissions alone do not tell: with a folder that is gone again at once.

    Raises:
        QtoolError: (usage) OUT cannot be created or written; the message names the folder that
            takes nothing.
    """
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".qtool-", dir=place)).rmdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # which say so themselves
            raise
        what = "written" if place == path else "created"
        raise QtoolError(
            f"{path} cannot be {what}: {place} takes no new files",
            kind="usage",
            hint=("choose another place with ", Option("output", "OUT")),
        ) from error


@contextmanager
def hold_lock(lock: Path, output: Path) -> Iterator[None]:
    """Keep other processes out of `output` by the file `lock`.

    Raises:
        QtoolError: (usage) another one holds it.
    """
    with lock.open("a", encoding="ascii") as file:  # which changes nothing of it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QtoolError(
                f"{output}: another qtool process is writing this folder",
                kind="usage",
                hint="wait for it, or write elsewhere with -o",
            ) from error
        yield


def encode_json(value: Any) -> bytes:
    """JSON as every small file of OUT is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
