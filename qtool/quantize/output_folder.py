"""The output folder as a transaction: a folder that looks finished is finished.

    OUT/.qtool/lock             held for the length of a run
    OUT/.qtool/journal.jsonl    what is being made (first line), then a line for each file
    OUT/.qtool/NAME.partial     a file in work; there may be several
    OUT/model-*.safetensors     complete and synced, then journalled, then renamed, one by one
    OUT/qtool_manifest.json     source, options, checksum of every file
    OUT/config.json             the last file to appear; then .qtool goes

A run that finds an equal journal makes only the files that it does not list, or that are not there.
A file is journalled before it gets its name, so whatever lies in OUT and is not listed is somebody
else's: it is neither overwritten nor removed. Knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.output_place import (
    WORK_FOLDER,
    hold_lock,
    refuse_file,
    require_writable,
    sync,
)
from qtool.errors import Option, QtoolError, Words
from qtool.quantize.folder_state import (
    JOURNAL,
    FileRecord,
    FolderState,
    RunIdentity,
    encode_manifest,
    read_state,
)
from qtool.quantize.growing_file import GrowingFile

LOCK: Final = "lock"
_SPACE_MARGIN: Final = 0.01  # file system overhead beside the exactly known bytes
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class OutputFolder:
    """An open, locked output folder; made by `open_output_folder`.

    Several threads may create files at once.

    Args:
        finished: the files that need not be made again.
        is_complete: all of them are there, and nothing is left to do.
    """

    def __init__(
        self,
        path: Path,
        identity: RunIdentity,
        finished: Mapping[str, FileRecord],
        *,
        is_complete: bool = False,
    ) -> None:
        self.path = path
        self.identity = identity
        self.finished = dict(finished)
        self.is_complete = is_complete
        self.resumed = self.holds_work
        self._journal = path / WORK_FOLDER / JOURNAL
        self._publishing = threading.Lock()

    @property
    def holds_work(self) -> bool:
        """Whether a file is finished whose content was not known before it was made."""
        return any(name not in self.identity.digests for name in self.finished)

    @contextmanager
    def create_file(self, name: str, num_bytes: int) -> Iterator[GrowingFile]:
        """Yield a preallocated file for the body to write, which then is synced and finished.

        The file is removed when the body fails.
        """
        partial = self._partial(name)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _preallocate(descriptor, num_bytes)
            file = GrowingFile(descriptor, num_bytes)
            yield file
            record = FileRecord(num_bytes, file.sha256())
            os.fsync(descriptor)
            self._publish(name, record)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (*_NO_SPACE, errno.EFBIG):
                raise self._no_space(name, num_bytes, error) from error
            raise
        finally:
            os.close(descriptor)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with self.create_file(name, len(data)) as file:
            file.write(data, 0)

    def complete(self, last_files: Mapping[str, bytes]) -> None:
        """Write the manifest, then `last_files` in order; then the folder is finished."""
        records = {name: hash_bytes(data) for name, data in last_files.items()}
        files = {
            name: records.get(name) or self.finished[name] for name in self.identity.file_names
        }
        self.write_file(MANIFEST, encode_manifest(self.identity, files))
        for name, data in last_files.items():
            self.write_file(name, data)
        self._journal.unlink()
        sync(self._journal.parent)

    def discard(self) -> None:
        """Remove all that this run published: its source turned out to be unusable."""
        _remove(self.path, self.finished)
        self._journal.unlink(missing_ok=True)

    def _publish(self, name: str, record: FileRecord) -> None:
        """Journal a synced file and give it its name."""
        target = self.path / name
        with self._publishing:
            target.parent.mkdir(parents=True, exist_ok=True)
            entry = {"file": name, "bytes": record.num_bytes, "sha256": record.sha256}
            _append_line(self._journal, entry)
            self._partial(name).replace(target)
            sync(target.parent)
            self.finished[name] = record

    def _partial(self, name: str) -> Path:
        return self.path / WORK_FOLDER / f"{name.replace('/', '%2F')}.partial"

    def _no_space(self, name: str, num_bytes: int, error: OSError) -> QtoolError:
        kept = "; finished files are kept" if self.holds_work else ""
        what = f"no space for its {num_bytes:,} bytes"
        hint: Words = f"free some space and run the same command again{kept}"
        if error.errno == errno.EFBIG:
            what = f"expected room for a file of {num_bytes:,} bytes, found a limit below that"
            hint = (
                "raise it (`ulimit -f` shows the shell's; a file system has one of its own), or "
                "write smaller files with ",
                Option("max_shard_size"),
            )
        return QtoolError(f"{self.path / name}: {what}", kind="no_space", hint=hint)


@contextmanager
def open_output_folder(
    path: Path, identity: RunIdentity, sizes: Mapping[str, int], *, restart: bool
) -> Iterator[OutputFolder]:
    """Create, resume or refuse `path`, and hold its lock.

    Args:
        sizes: bytes of the large files by name.

    Raises:
        QtoolError: the folder holds foreign files, a run with other settings or of another source,
            or another process is writing it; or nothing can be written there, or not so much.
    """
    refuse_file(path)
    read_state(path).refuse_foreign()
    require_writable(path)
    with _locked(path):
        state = _judge(path, identity, sizes, restart=restart)  # nobody else writes it any more
        if state.kind == "finished" and not restart:
            yield OutputFolder(path, identity, state.files, is_complete=True)
            return
        finished = _begin(state, identity, restart=restart)
        yield OutputFolder(path, identity, finished)


def check_output_folder(
    path: Path, identity: RunIdentity, sizes: Mapping[str, int], *, restart: bool
) -> bool:
    """Raise as `open_output_folder`, but write nothing; whether nothing is left to do."""
    refuse_file(path)
    state = read_state(path)
    state.refuse_foreign()
    is_tidy = not (path / WORK_FOLDER).exists()  # else a run was killed at its very end
    if state.kind == "finished" and is_tidy and not restart:  # nobody writes it any more
        state.require_same(identity)
        return True
    require_writable(path)
    lock = path / WORK_FOLDER / LOCK
    with hold_lock(lock, path) if lock.is_file() else contextlib.nullcontext():
        _judge(path, identity, sizes, restart=restart)
    return False


def hash_bytes(data: bytes) -> FileRecord:
    """The record of a file with this content."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


# -- what was there before -------------------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; leaves nothing behind where no run is under way."""
    work = path / WORK_FOLDER
    with hold_lock(work / LOCK, path):
        try:
            yield
        finally:
            if not (work / JOURNAL).exists():
                # The lock is the last to go: until then nobody else begins here.
                for stale in work.glob("*.partial"):
                    stale.unlink(missing_ok=True)
                (work / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the next one is there, or there is a result
                    work.rmdir()
                    sync(path)
                    path.rmdir()


def _judge(
    path: Path, identity: RunIdentity, sizes: Mapping[str, int], *, restart: bool
) -> FolderState:
    """What lies there, if it may be gone on with or replaced."""
    state = read_state(path)
    state.refuse_foreign()
    if not restart:
        state.require_same(identity)
        state.refuse_edited(identity)
    if restart or state.kind != "finished":
        state.refuse_overwriting((*identity.file_names, MANIFEST))
        goes_on = state.kind == "unfinished" and not restart
        replaced = [*(path / WORK_FOLDER).glob("*.partial")]
        replaced += [] if goes_on else [path / name for name in state.own_names]
        _require_space(
            path,
            sum(size for name, size in sizes.items() if not goes_on or name not in state.files),
            freed_bytes=sum(file.stat().st_size for file in replaced if file.is_file()),
        )
    return state


def _begin(state: FolderState, identity: RunIdentity, *, restart: bool) -> Mapping[str, FileRecord]:
    """Go on with what lies there, or clear it away; returns the files that are finished."""
    work = state.path / WORK_FOLDER
    for stale in work.glob("*.partial"):
        stale.unlink()
    if state.kind == "unfinished" and not restart:
        _cut_torn_line(work / JOURNAL)
        _remove(state.path, state.own_names - state.files.keys())  # those that were cut
        return state.files
    _remove(state.path, state.own_names)
    (work / JOURNAL).unlink(missing_ok=True)
    _append_line(work / JOURNAL, identity.as_journal_head())
    sync(work)
    return {}


def _remove(path: Path, names: Collection[str]) -> None:
    # The config first: without it the folder looks as unfinished as it is. The manifest last: it
    # says whose the others are.
    for name in sorted(names, key=lambda name: (name == MANIFEST, name != CONFIG_NAME)):
        (path / name).unlink(missing_ok=True)
        for folder in (path / name).parents:
            if folder == path:
                break
            with contextlib.suppress(OSError):  # it holds something else
                folder.rmdir()
    sync(path)


def _cut_torn_line(journal: Path) -> None:
    """Let the next line begin where a whole one ended."""
    data = journal.read_bytes()
    whole_bytes = data.rfind(b"\n") + 1
    if whole_bytes < len(data):
        os.truncate(journal, whole_bytes)


# -- bytes on disk ---------------------------------------------------------------------------------


def _require_space(path: Path, num_bytes: int, freed_bytes: int = 0) -> None:
    """Raise QtoolError(no_space) unless so much fits once what is replaced is gone."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    status = os.statvfs(place)
    free_bytes = status.f_bavail * status.f_frsize + freed_bytes
    needed_bytes = int(num_bytes * (1 + _SPACE_MARGIN))
    if free_bytes < needed_bytes:
        raise QtoolError(
            f"{path}: the output needs {needed_bytes:,} bytes, {free_bytes:,} are free",
            kind="no_space",
            hint="free some space, or write elsewhere with -o",
        )


def _preallocate(descriptor: int, num_bytes: int) -> None:
    """Claim the space now, so that a full disk shows before the work; then nothing can be short."""
    if num_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, num_bytes)


def _append_line(journal: Path, entry: Mapping[str, Any]) -> None:
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _write_all(descriptor, (json.dumps(entry) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
