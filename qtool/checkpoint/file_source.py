"""What opening a checkpoint needs of the place where its files lie: a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from qtool.errors import QtoolError


class FileStatus(NamedTuple):
    """A file's size and, where it lies on this machine, the time of its last write."""

    num_bytes: int
    modified_ns: int | None


class Traffic(NamedTuple):
    """What reading from a server has cost so far."""

    num_requests: int
    num_bytes: int
    seconds: float


class FileSource(Protocol):
    """A set of named files that can be read in parts."""

    @property
    def path(self) -> Path | None:
        """The folder that holds the files; None if they are not on this machine."""
        ...

    @property
    def revision(self) -> str | None:
        """The Hub commit that the files belong to, where they came from the Hub."""
        ...

    @property
    def num_parallel_reads(self) -> int:
        """How many reads at once pay off."""
        ...

    @property
    def traffic(self) -> Traffic | None:
        """What the reads so far have cost, where they cost requests."""
        ...

    @property
    def missing_hint(self) -> str:
        """What to do when a file of the model is not there."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Relative name -> bytes, sorted; no hidden files."""
        ...

    def describe(self, name: str) -> str:
        """How messages name the file."""
        ...

    def status_of(self, name: str) -> FileStatus:
        """The file's size and time; QtoolError if it is not there or may not be read."""
        ...

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` of the file from `offset` on."""
        ...


def read_whole(source: FileSource, name: str, *, max_bytes: int, hint: str) -> bytes:
    """A small file's bytes; QtoolError(bad_file) if it is larger than `max_bytes`."""
    num_bytes = source.status_of(name).num_bytes
    if num_bytes > max_bytes:
        raise QtoolError(
            f"{source.describe(name)}: expected at most {max_bytes:,} bytes, found {num_bytes:,}",
            kind="bad_file",
            hint=hint,
        )
    return source.read(name, 0, num_bytes)
