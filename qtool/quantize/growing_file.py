"""A file of known size that is written in any order and hashed from its start meanwhile.

A checksum is sequential, but tiles are finished in any order. So the thread that wants the checksum
follows the part that is complete from the start, which another one reads back from the page cache
for it; when the last range is written, only a short rest is left to hash.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

_HASH_CHUNK_BYTES = 4 << 20  # two are in work: one is read while the other is hashed


class GrowingFile:
    """An open file of `num_bytes`. Any thread may write; one at a time may wait or hash.

    Args:
        descriptor: the file, open for reading and writing; it stays the caller's.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._fd = descriptor
        self._grown = threading.Condition()
        self._complete_bytes = 0  # from the start, without a hole
        self._islands: dict[int, int] = {}  # begin -> end of what was written beyond
        self._wanted_bytes = 0
        self._abandoned = False
        self._digest = hashlib.sha256()
        self._hashed_bytes = 0

    def write(self, data: NDArray[Any] | bytes, offset: int) -> None:
        """Write contiguous `data` at `offset`; no byte of the file may be written twice."""
        view = memoryview(data) if isinstance(data, bytes) else data.data
        if not view.nbytes:
            return
        view = view.cast("B")
        done = 0
        while done < len(view):  # one call writes at most 2 GiB
            done += os.pwrite(self._fd, view[done:], offset + done)
        with self._grown:
            self._islands[offset] = offset + done
            while self._complete_bytes in self._islands:
                self._complete_bytes = self._islands.pop(self._complete_bytes)
            if self._complete_bytes >= self._wanted_bytes:
                self._grown.notify_all()

    def wait_for(self, num_bytes: int) -> int:
        """Block until the first `num_bytes` are written; returns how many are, without a hole.

        Raises:
            CancelledError: the file was abandoned.
        """
        with self._grown:
            self._wanted_bytes = num_bytes
            self._grown.wait_for(lambda: self._complete_bytes >= num_bytes or self._abandoned)
            if self._abandoned:
                raise CancelledError("the file will not be complete")
            return self._complete_bytes

    def abandon(self) -> None:
        """Wake who waits: the file will not be complete."""
        with self._grown:
            self._abandoned = True
            self._grown.notify_all()

    def require_complete(self) -> None:
        """Raise RuntimeError unless every byte was written: nobody may wait for a hole."""
        with self._grown:
            if self._complete_bytes != self.num_bytes:
                raise RuntimeError(f"nothing was written at offset {self._complete_bytes:,}")

    def sha256(self) -> str:
        """The checksum of the whole file, in hexadecimal; waits for what is not written yet."""
        spare = bytearray(_HASH_CHUNK_BYTES), bytearray(_HASH_CHUNK_BYTES)
        with ThreadPoolExecutor(1, thread_name_prefix="hash-reader") as reader:
            ahead = reader.submit(self._read_at, self._hashed_bytes, spare[0])
            while self._hashed_bytes < self.num_bytes:
                chunk = ahead.result()
                spare = spare[::-1]
                ahead = reader.submit(self._read_at, self._hashed_bytes + len(chunk), spare[0])
                self._digest.update(chunk)
                self._hashed_bytes += len(chunk)
        return self._digest.hexdigest()

    def _read_at(self, offset: int, buffer: bytearray) -> memoryview:
        """The next part of the file, once it is written: a view of `buffer`, empty at the end."""
        size = min(len(buffer), self.num_bytes - offset)
        self.wait_for(offset + size)
        num_read = os.preadv(self._fd, [memoryview(buffer)[:size]], offset) if size else 0
        if num_read == 0 < size:
            raise RuntimeError(f"the file was cut to {offset:,} bytes meanwhile")
        return memoryview(buffer)[:num_read]
