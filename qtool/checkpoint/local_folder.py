"""A model folder on disk as a set of files: sizes, bounded reads, links that may not leave it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

from qtool.checkpoint.file_source import FileStatus
from qtool.errors import QtoolError

# Far above any model; ends the walk soon when someone points at a home folder.
MAX_FILES: Final = 20_000


class LocalFolder:
    """The files of one folder.

    A symbolic link counts as the file that it points to, but is read only if that lies inside the
    folder, or among the blobs of the Hub cache that the folder belongs to.

    Args:
        path: the folder.
        revision: the Hub commit, if the folder is a snapshot in the Hub cache.
        only: names that count; other files are as good as absent.
    """

    num_parallel_reads: Final = 1
    traffic: Final = None

    def __init__(
        self, path: Path, *, revision: str | None = None, only: Collection[str] | None = None
    ) -> None:
        self.path = path
        self.revision = revision
        self._only = only

    @property
    def missing_hint(self) -> str:
        """What to do when a file of the model is not there."""
        if self.revision is not None:
            return "the cached copy of the model is incomplete; run the command again online"
        return "download or copy the model again, completely"

    @cached_property
    def files(self) -> Mapping[str, int]:
        """Relative name ("config.json", "1_Pooling/config.json") -> bytes, sorted.

        Hidden files and folders are left out, and so are links that point to nothing.
        """
        if self._only is not None:
            return {
                name: self.status_of(name).num_bytes
                for name in sorted(self._only)
                if (self.path / name).exists()
            }
        return dict(sorted(self._walk()))

    def describe(self, name: str) -> str:
        """How messages name the file `name`."""
        return str(self.path / name)

    def status_of(self, name: str) -> FileStatus:
        """The file's size and time of the last write.

        Raises:
            QtoolError: it does not exist, is no regular file, or lies outside the folder.
        """
        self._check_inside(name)
        path = self.path / name
        try:
            status = path.stat()
        except OSError as error:
            raise self._unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise QtoolError(
                f"{path}: expected a regular file, found {found}",
                kind="bad_file",
                hint=self.missing_hint,
            )
        return FileStatus(status.st_size, status.st_mtime_ns)

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` of the file `name` from `offset` on; errors as for `status_of`."""
        self.status_of(name)
        path = self.path / name
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(num_bytes)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _check_inside(self, name: str) -> None:
        target = (self.path / name).resolve()
        if not any(target.is_relative_to(root) for root in self._roots):
            raise QtoolError(
                f"{self.describe(name)}: expected a file inside the model's folder, found a link "
                f"to {target}",
                kind="bad_file",
                hint="replace the link by the file itself, or give the folder that it points to",
            )

    @cached_property
    def _roots(self) -> tuple[Path, ...]:
        folder = self.path.resolve()
        # The Hub cache: models--ORG--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH
        if folder.parent.name == "snapshots":
            return folder, (folder.parent.parent / "blobs").resolve()
        return (folder,)

    def _unreadable(self, path: Path, error: OSError) -> QtoolError:
        missing = isinstance(error, FileNotFoundError)
        return QtoolError(
            f"{path}: {(error.strerror or str(error)).lower()}",
            kind="not_found" if missing else "bad_file",
            hint=self.missing_hint if missing else "check the file and its permissions",
        )

    def _walk(self) -> Iterator[tuple[str, int]]:
        num_files = 0
        for folder, subfolders, names in os.walk(self.path, onerror=self._raise_unreadable):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            num_files += len(names)
            if num_files > MAX_FILES:
                raise QtoolError(
                    f"{self.path}: expected a model folder, found more than {MAX_FILES:,} files",
                    kind="bad_file",
                    hint="give the folder that holds config.json and *.safetensors",
                )
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".") and path.exists():
                    yield str(path.relative_to(self.path)), path.stat().st_size

    def _raise_unreadable(self, error: OSError) -> None:
        raise self._unreadable(Path(error.filename or self.path), error) from error
