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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TextIO

from qtool.errors import Option, QtoolError

WORK_FOLDER = ".qtool"  # in OUT while it is being written, and after an interruption
_LOCK_ATTEMPTS: Final = 100  # more than as many processes that end at this very moment


def refuse_file(path: Path) -> None:
    """Raise QtoolError (usage) where OUT is there and is no folder, or is a link to nothing."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise QtoolError(
                f"{link} is a link to {link.readlink()}, which does not exist; expected a folder "
                "to write",
                kind="usage",
                hint=("remove the link, or choose another ", Option("output")),
            )
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
    """Keep other processes out of `output` by the file `lock`, which is made if it is not there.

    Raises:
        QtoolError: (usage) another one holds it.
    """
    with _take_lock(lock, output):
        yield


def _take_lock(lock: Path, output: Path) -> TextIO:
    """The lock's file, which holds it until it is closed.

    Who held it before may remove it, folder and all, while we open it. A lock on a file without a
    name keeps nobody out, so it is taken again by its name.
    """
    for _ in range(_LOCK_ATTEMPTS):
        with ExitStack() as opened, suppress(FileNotFoundError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(lock.open("a", encoding="ascii"))  # changes nothing of it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                opened.pop_all()
                return file
    raise QtoolError(
        f"{output}: another qtool process is writing this folder",
        kind="usage",
        hint="wait for it, or write elsewhere with -o",
    )


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
