"""The output folder as a transaction: a folder that looks finished is finished.

    OUT/.qtool/lock             held for the length of a run
    OUT/.qtool/journal.jsonl    what is being made (first line), then a line per finished file
    OUT/.qtool/NAME.partial     a file in work; there may be several
    OUT/model-*.safetensors     complete and synced, then renamed, then journalled, one by one
    OUT/qtool_manifest.json     source, options, checksum of every file
    OUT/config.json             the last file to appear; then .qtool goes

A run that finds an equal journal makes only the files that it does not list. Knows nothing of
tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.checkpoint.output_place import (
    WORK_FOLDER,
    encode_json,
    hold_lock,
    refuse_file,
    require_writable,
    sync,
)
from qtool.errors import Option, QtoolError
from qtool.quantize.growing_file import GrowingFile

JOURNAL = "journal.jsonl"
LOCK = "lock"
MANIFEST = "qtool_manifest.json"
MANIFEST_SCHEMA = 1
_SPACE_MARGIN = 0.01  # file system overhead beside the exactly known bytes


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of a finished file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What makes two runs the same command: equal identities give equal folders.

    `source` and `options` also stand in the manifest. `source_state` (sizes and times of the source
    files; empty where they are not here) only guards a resumed run against a source that changed in
    between.
    """

    source: Mapping[str, Any]
    options: Mapping[str, Any]
    source_state: Mapping[str, Any]
    file_names: tuple[str, ...]  # every file that will be written

    def as_journal_head(self) -> dict[str, Any]:
        """The journal's first line."""
        return {
            "qtool_version": __version__,
            "source": self.source,
            "options": self.options,
            "source_state": self.source_state,
            "file_names": list(self.file_names),
        }


class OutputFolder:
    """An open, locked output folder; made by `open_output_folder`.

    Several threads may create files at once.
    """

    def __init__(self, path: Path, identity: RunIdentity, finished: dict[str, FileRecord]) -> None:
        self.path = path
        self.identity = identity
        self.finished = finished
        self.resumed = bool(finished)
        self._work = path / WORK_FOLDER
        self._publishing = threading.Lock()

    def require_space(self, num_bytes: int) -> None:
        """Raise QtoolError(no_space) unless `num_bytes` more fit on the file system."""
        _require_space(self.path, num_bytes)

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
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise QtoolError(
                    f"{self.path / name}: no space for its {num_bytes:,} bytes",
                    kind="no_space",
                    hint="free some space and run the same command again; finished files are kept",
                ) from error
            raise
        finally:
            os.close(descriptor)

    def write_file(self, name: str, data: bytes) -> FileRecord:
        """Write a small file whole."""
        with self.create_file(name, len(data)) as file:
            file.write(data, 0)
        return self.finished[name]

    def complete(self, manifest: bytes, last_files: Mapping[str, bytes]) -> None:
        """Write the manifest, then `last_files` in order; then the folder is finished."""
        for name, data in {MANIFEST: manifest, **last_files}.items():
            self.write_file(name, data)
        shutil.rmtree(self._work)
        sync(self.path)

    def discard(self) -> None:
        """Remove all that this run wrote: its source turned out to be unusable."""
        for name in self.identity.file_names:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._work, ignore_errors=True)
        with contextlib.suppress(OSError):  # it held something else before
            self.path.rmdir()

    def _publish(self, name: str, record: FileRecord) -> None:
        """Give a synced file its name and journal it."""
        target = self.path / name
        with self._publishing:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._partial(name).replace(target)
            sync(target.parent)
            entry = {"file": name, "bytes": record.num_bytes, "sha256": record.sha256}
            _append_line(self._work / JOURNAL, entry)
            self.finished[name] = record

    def _partial(self, name: str) -> Path:
        return self._work / f"{name.replace('/', '%2F')}.partial"


@contextmanager
def open_output_folder(
    path: Path, identity: RunIdentity, *, restart: bool
) -> Iterator[OutputFolder]:
    """Create, resume or refuse `path`, and hold its lock.

    Raises:
        QtoolError: the folder holds foreign files, a run with other settings or of another source,
            or another process is writing it; or nothing can be written there.
    """
    _refuse_foreign(path)
    work = path / WORK_FOLDER
    require_writable(path)
    work.mkdir(parents=True, exist_ok=True)
    with hold_lock(work / LOCK, path):
        _cut_torn_line(work / JOURNAL)
        if restart:
            _remove_own_files(path)
        try:
            finished = _read_finished(path, identity)
        except QtoolError:
            if not (work / JOURNAL).exists():  # a finished folder stays as it was
                shutil.rmtree(work)
            raise
        if (path / MANIFEST).exists() and not (work / JOURNAL).exists():
            _remove_own_files(path)  # finished once, but files are missing or cut: make it anew
        for stale in work.glob("*.partial"):
            stale.unlink()
        if not finished:
            _start_journal(work / JOURNAL, identity)
        yield OutputFolder(path, identity, finished)


def check_output_folder(
    path: Path, identity: RunIdentity, sizes: Mapping[str, int], *, restart: bool
) -> None:
    """Raise as `open_output_folder`, and for too little space, but write nothing.

    Args:
        sizes: bytes of the large files by name.
    """
    _refuse_foreign(path)
    require_writable(path)
    work = path / WORK_FOLDER
    if (work / LOCK).is_file():
        with hold_lock(work / LOCK, path):
            pass
    finished = {} if restart else _read_finished(path, identity)
    goes_on = (work / JOURNAL).exists() and not restart
    replaced = [*work.glob("*.partial"), *([] if goes_on else (path / n for n in _own_names(path)))]
    freed_bytes = sum(file.stat().st_size for file in replaced if file.is_file())
    missing_bytes = sum(size for name, size in sizes.items() if name not in finished)
    _require_space(path, missing_bytes, freed_bytes)


def read_finished_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None for an unfinished, foreign or missing one."""
    if not (path / MANIFEST).is_file() or (path / WORK_FOLDER / JOURNAL).exists():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return manifest if isinstance(manifest, dict) else None


def require_same(found: Mapping[str, Any], identity: RunIdentity, path: Path) -> None:
    """Raise QtoolError(differs) naming the options or source in which `found` differs."""
    wanted: Mapping[str, Any] = identity.as_journal_head()
    differences: list[str] = []
    for part in ("options", "source", *(("source_state",) if identity.source_state else ())):
        old, new = found.get(part, wanted[part]), wanted[part]
        differences += _differences(part, old, new)
    if differences:
        raise QtoolError(
            f"{path} was made with other settings: {'; '.join(differences[:4])}",
            kind="usage",
            hint=(
                "use the same options to continue it, ",
                Option("restart"),
                " to begin anew, or another ",
                Option("output"),
            ),
        )


def _differences(part: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs in a part of an identity, in words; of files no sizes, times and checksums."""
    keys = _changed(old, new)
    if part == "options":  # those that only quantizing has say no more than that it is done
        keys = [key for key in keys if key == "quant" or (key in old and key in new)] or keys
    else:  # another model has other files
        keys = [key for key in keys if key != "files"] or keys
    for key in keys:
        before, now = old.get(key), new.get(key)
        if part == "source_state":
            yield f"{key} has changed since"
        elif isinstance(before, Mapping) and isinstance(now, Mapping) and _same_name(before, now):
            files, others = (side.get("sha256", side) for side in (before, now))
            yield from (f"{name} is another one now" for name in _changed(files, others) or [key])
        else:
            yield f"{key} is {_in_words(before)} there, {_in_words(now)} now"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _same_name(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two adapters are called alike; lists of files have no names."""
    return bool(before.get("name") == now.get("name"))


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name", "another"))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def encode_manifest(identity: RunIdentity, files: Mapping[str, FileRecord]) -> bytes:
    """The manifest's bytes; nothing in them depends on machine, time or backend."""
    return encode_json(
        {
            "schema": MANIFEST_SCHEMA,
            "qtool_version": __version__,
            "source": identity.source,
            "options": identity.options,
            "files": {
                name: {"bytes": record.num_bytes, "sha256": record.sha256}
                for name, record in sorted(files.items())
            },
        }
    )


def hash_bytes(data: bytes) -> FileRecord:
    """The record of a file with this content."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


# -- states of an existing folder ------------------------------------------------------------------


def _refuse_foreign(path: Path) -> None:
    refuse_file(path)
    if not path.is_dir() or (path / MANIFEST).is_file() or (path / WORK_FOLDER).is_dir():
        return
    first = next((entry.name for entry in sorted(path.iterdir())), None)
    if first is not None:
        raise QtoolError(
            f"{path} is not empty and was not written by qtool (found {first})",
            kind="usage",
            hint="choose another folder with -o; qtool never overwrites files it did not write",
        )


def _read_finished(path: Path, identity: RunIdentity) -> dict[str, FileRecord]:
    lines = _read_lines(path / WORK_FOLDER / JOURNAL)
    if not lines:
        manifest = read_finished_manifest(path)
        if manifest is not None:
            require_same(manifest, identity, path)
        return {}
    head, *entries = lines
    require_same(head, identity, path)
    if head.get("qtool_version") != __version__:
        raise QtoolError(
            f"{path} was begun by qtool {head.get('qtool_version')}, this is {__version__}",
            kind="usage",
            hint=(Option("restart"), " begins anew"),
        )
    records = {entry["file"]: FileRecord(entry["bytes"], entry["sha256"]) for entry in entries}
    return {name: r for name, r in records.items() if _has_size(path / name, r.num_bytes)}


def _remove_own_files(path: Path) -> None:
    # The config first: without it the folder looks as unfinished as it is.
    for name in sorted(_own_names(path), key=lambda name: name != "config.json"):
        (path / name).unlink(missing_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    (path / WORK_FOLDER / JOURNAL).unlink(missing_ok=True)


def _own_names(path: Path) -> set[str]:
    """The files that runs of ours wrote here, or would have."""
    names: set[str] = set()
    lines = _read_lines(path / WORK_FOLDER / JOURNAL)
    if lines:
        names |= set(lines[0].get("file_names", []))
    manifest = read_finished_manifest(path)
    if manifest is not None:
        names |= set(manifest.get("files", {}))
    return {name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts}


def _read_lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's whole lines, without a last one that a crash has torn."""
    try:
        data = journal.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _cut_torn_line(journal: Path) -> None:
    """Let the next line begin where a whole one ended."""
    data = journal.read_bytes() if journal.is_file() else b""
    whole_bytes = data.rfind(b"\n") + 1
    if whole_bytes < len(data):
        os.truncate(journal, whole_bytes)


def _start_journal(journal: Path, identity: RunIdentity) -> None:
    journal.unlink(missing_ok=True)
    _append_line(journal, identity.as_journal_head())
    sync(journal.parent)


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


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False
