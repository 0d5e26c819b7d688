"""Reads tensor bytes from a local safetensors file into the caller's buffers.

No memory map: a file that is cut short under a map ends the process with a signal instead of an
error, and reads of a few MiB are as fast.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from qtool.checkpoint.records import Checkpoint, Shard, TensorInfo
from qtool.errors import QtoolError
from qtool.formats.tensors import DTYPE_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHANGED_HINT = "let nothing write to the model's folder meanwhile, and run the command again"


class TensorReader(Protocol):
    """Tensors' bytes in parts, whatever they come from; from several threads at once."""

    def read_into(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        """Fill `buffer` (C-contiguous) with the tensor's bytes from `start` on."""
        ...

    def read_columns(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        """Fill `buffer` (rows, n) with the columns of a matrix from `start` on."""
        ...


# A reader of the tensors of the shards that are named, until the context is left.
OpenTensors = Callable[[Checkpoint, Collection[str]], AbstractContextManager[TensorReader]]


@contextmanager
def open_shards(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[TensorReader]:
    """The tensors of the shards `names` as they are stored; see `open_shard`."""
    with ExitStack() as stack:
        readers = {name: stack.enter_context(open_shard(checkpoint, name)) for name in names}
        yield _StoredTensors(readers)


class _StoredTensors:
    def __init__(self, readers: dict[str, ShardReader]) -> None:
        self._readers = readers

    def read_into(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        self._readers[tensor.shard].read_into(buffer, tensor.offset + start)

    def read_columns(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        num_rows, num_columns = tensor.shape
        itemsize = DTYPE_BITS[tensor.dtype] // 8
        self._readers[tensor.shard].read_columns(
            tensor.offset,
            rows=num_rows,
            row_bytes=num_columns * itemsize,
            col_start_bytes=start * itemsize,
            col_num_bytes=buffer.shape[1] * itemsize,
            buffer=buffer,
        )


def open_shard(checkpoint: Checkpoint, name: str) -> ShardReader:
    """A reader of the shard `name`, which must still be the file whose header was read."""
    shard = next(shard for shard in checkpoint.shards if shard.file_name == name)
    return ShardReader(checkpoint.path_of(name), shard=shard)


class ShardReader:
    """One open safetensors file; closing it checks that nobody changed the file meanwhile.

        with open_shard(checkpoint, tensor.shard) as reader:
            data = reader.read_tensor(tensor)

    Methods may be called from several threads at once.

    Args:
        path: the file.
        shard: what was known of the file when its header was read, to be compared with the file.
    """

    def __init__(self, path: Path, *, shard: Shard | None = None) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self._file_bytes = shard.file_bytes if shard else status.st_size
        self._modified_ns = shard.modified_ns if shard else status.st_mtime_ns
        try:
            self.check_unchanged()
        except QtoolError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        """Release the file without checking it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_unchanged(self) -> None:
        """Raise QtoolError(bad_file) if the file was written to since its header was read."""
        status = os.fstat(self._fd)
        if status.st_size != self._file_bytes:
            raise self._changed(f"{self._file_bytes:,} bytes", f"{status.st_size:,}")
        if self._modified_ns not in (None, status.st_mtime_ns):
            raise self._changed(
                f"the last write at {_time_of(self._modified_ns)}", _time_of(status.st_mtime_ns)
            )

    def read_into(self, buffer: NDArray[Any], offset: int) -> None:
        """Fill `buffer` (C-contiguous, any dtype and shape) from the absolute `offset`.

        Raises:
            QtoolError: bad_file, if the file ends earlier.
        """
        if buffer.nbytes:
            self._fill(buffer.data.cast("B"), offset)

    def read_tensor(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """A tensor's bytes: uint8 (num_bytes,), freshly allocated."""
        import numpy as np

        data = np.empty(tensor.num_bytes, np.uint8)
        self.read_into(data, tensor.offset)
        return data

    def read_columns(
        self,
        offset: int,
        rows: int,
        row_bytes: int,
        col_start_bytes: int,
        col_num_bytes: int,
        buffer: NDArray[Any],
    ) -> None:
        """Fill `buffer` with a slab of columns of a row-major matrix that begins at `offset`.

        Takes `col_num_bytes` from `col_start_bytes` on of each of the `rows` rows of `row_bytes`;
        `buffer` gets them row by row, rows * col_num_bytes in all.
        """
        col_end_bytes = col_start_bytes + col_num_bytes
        if buffer.nbytes != rows * col_num_bytes or col_end_bytes > row_bytes:
            raise ValueError(
                f"{buffer.nbytes} bytes of buffer for {rows} rows of {row_bytes} bytes, of which "
                f"{col_start_bytes} to {col_end_bytes}"
            )
        if buffer.nbytes == 0:
            return
        view = buffer.data.cast("B")
        if col_num_bytes == row_bytes:
            self._fill(view, offset)
            return
        for row in range(rows):
            begin = row * col_num_bytes
            source = offset + row * row_bytes + col_start_bytes
            self._fill(view[begin : begin + col_num_bytes], source)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):  # one call reads at most 2 GiB
            num_read = os.preadv(self._fd, [view[done:]], offset + done)
            if num_read == 0:
                raise QtoolError(
                    f"{self.path}: expected {len(view):,} bytes at offset {offset:,}, found "
                    f"{done:,}: the file is truncated",
                    kind="bad_file",
                    hint="download or copy the file again",
                )
            done += num_read

    def _changed(self, expected: str, found: str) -> QtoolError:
        return QtoolError(
            f"{self.path}: changed while reading: expected {expected}, found {found}",
            kind="bad_file",
            hint=CHANGED_HINT,
        )


def _time_of(modified_ns: int) -> str:
    seconds, rest_ns = divmod(modified_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest_ns:09d}"
