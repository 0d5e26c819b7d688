"""Reading what a quantized weight consists of: its quant_state, its statistics, its values.

Values are dequantized tile by tile, so memory depends on the tile and not on the weight. Tiles
start at multiples of 256 blocks of the largest size, where codes, absmax and nested_absmax all
begin anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import Backend
from qtool.checkpoint.reading import ShardReader
from qtool.checkpoint.records import TensorInfo
from qtool.errors import Option, QtoolError
from qtool.formats.bitsandbytes import (
    QuantizedWeight,
    QuantState,
    layout_problems,
    parse_quant_state,
)
from qtool.formats.floats import NUMPY_DTYPES, widen
from qtool.formats.precisions import BLOCKSIZES, NESTED_BLOCKSIZE
from qtool.formats.tensors import TORCH_NAMES, SourceDtype, TensorLayout

MAX_QUANT_STATE_BYTES: Final = 1 << 16  # bitsandbytes writes about 170
TILE_ELEMENTS: Final = NESTED_BLOCKSIZE * max(BLOCKSIZES)  # 1 Mi: some 10 MiB of work
_SOURCE_DTYPES: Final = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}


class TensorFiles:
    """The shards of one folder, opened as they are needed; a context manager.

    May be read from several threads at once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._readers: dict[str, ShardReader] = {}
        self._lock = Lock()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def read_bytes(
        self, tensor: TensorLayout, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the tensor's data, uint8 (stop - start,)."""
        info = cast(TensorInfo, tensor)
        stop = info.num_bytes if stop is None else stop
        buffer = np.empty(stop - start, np.uint8)
        self._reader(info.shard).read_into(buffer, info.offset + start)
        return buffer

    def read_values(self, tensor: TensorLayout, start: int = 0, stop: int | None = None) -> Any:
        """Elements [start, stop) of a tensor of a dtype that NumPy has; BF16 as its uint16 bits."""
        dtype = np.dtype(_NUMPY_DTYPES[tensor.dtype])
        stop = tensor.num_elements if stop is None else stop
        return self.read_bytes(tensor, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def read_columns(self, matrix: TensorLayout, start: int, stop: int) -> Any:
        """Columns [start, stop) of a stored matrix, (rows, stop - start)."""
        info = cast(TensorInfo, matrix)
        num_rows, num_columns = info.shape
        values = np.empty((num_rows, stop - start), np.dtype(_NUMPY_DTYPES[info.dtype]))
        size = values.itemsize
        self._reader(info.shard).read_columns(
            info.offset, num_rows, num_columns * size, start * size, (stop - start) * size, values
        )
        return values

    def _reader(self, shard: str) -> ShardReader:
        with self._lock:
            if shard not in self._readers:
                reader = ShardReader(self._folder / shard)
                self._readers[shard] = self._stack.enter_context(reader)
            return self._readers[shard]


_NUMPY_DTYPES: Final[dict[str, type[np.generic]]] = {
    "U8": np.uint8,
    "I8": np.int8,
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}


def read_quant_state(weight: QuantizedWeight, files: TensorFiles) -> QuantState:
    """The parsed quant_state of a 4-bit weight.

    Raises:
        QtoolError: the blob is not valid.
    """
    blob = cast(TensorInfo, weight.quant_state)
    try:
        # one byte more than is allowed is enough to be refused
        data = files.read_bytes(blob, 0, min(blob.num_bytes, MAX_QUANT_STATE_BYTES + 1))
        return parse_quant_state(data.tobytes())
    except ValueError as error:
        raise QtoolError(
            f"{blob.shard}: {blob.name}: {error}",
            kind="bad_file",
            hint=("see all with ", Option("verify", verb="inspect")),
        ) from error


def dequantized_tiles(
    weight: QuantizedWeight, files: TensorFiles, backend: Backend
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first element, float32 values) over the flattened weight, rows first.

    4-bit values are rounded to the dtype that the quant_state records, as every reader of the
    format gives them; INT8 values are not rounded.

    Raises:
        QtoolError: the statistics do not fit the weight.
    """
    state = None if weight.precision == "int8" else read_quant_state(weight, files)
    _refuse_broken(weight, state)
    if state is None:
        yield from _int8_tiles(weight, files, backend)
        return
    for start in range(0, state.num_elements, TILE_ELEMENTS):
        stop = min(start + TILE_ELEMENTS, state.num_elements)
        yield start, _four_bit_tile(weight, state, files, backend, start, stop)


def _four_bit_tile(
    weight: QuantizedWeight,
    state: QuantState,
    files: TensorFiles,
    backend: Backend,
    start: int,
    stop: int,
) -> NDArray[np.float32]:
    dtype: SourceDtype = _SOURCE_DTYPES[state.dtype]
    packed = files.read_bytes(weight.weight, start // 2, (stop + 1) // 2)
    first_block, last_block = start // state.blocksize, -(-stop // state.blocksize)
    absmax = _read_absmax(weight, state, files, backend, first_block, last_block)
    values: Any = np.empty(stop - start, NUMPY_DTYPES[dtype])
    backend.dequantize_4bit(packed, absmax, state.quant_type, state.blocksize, dtype, values)
    return widen(values, dtype)


def _read_absmax(
    weight: QuantizedWeight,
    state: QuantState,
    files: TensorFiles,
    backend: Backend,
    first: int,
    last: int,
) -> NDArray[np.float32]:
    """absmax of the blocks [first, last), double quantization undone; `first` starts a group."""
    stored = files.read_values(weight.statistics["absmax"], first, last)
    if state.nested_offset is None:
        return cast(NDArray[np.float32], stored)
    groups = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
    nested_absmax = files.read_values(weight.statistics["nested_absmax"], *groups)
    absmax = np.empty(last - first, np.float32)
    backend.dequantize_absmax(stored, nested_absmax, np.float32(state.nested_offset), absmax)
    return absmax


def _int8_tiles(
    weight: QuantizedWeight, files: TensorFiles, backend: Backend
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    num_rows, num_columns = weight.weight.shape
    rows_per_tile = max(1, TILE_ELEMENTS // max(1, num_columns))
    for row in range(0, num_rows, rows_per_tile):
        last_row = min(row + rows_per_tile, num_rows)
        codes = files.read_values(weight.weight, row * num_columns, last_row * num_columns)
        scb = files.read_values(weight.statistics["SCB"], row, last_row)
        values = np.empty((last_row - row, num_columns), np.float32)
        backend.dequantize_int8(codes.reshape(values.shape), scb, "F32", values)
        yield row * num_columns, values.reshape(-1)


def _refuse_broken(weight: QuantizedWeight, state: QuantState | None) -> None:
    for problem in layout_problems(weight, state):
        raise QtoolError(
            f"{cast(TensorInfo, weight.weight).shard}: {problem.tensor}: expected "
            f"{problem.expected}, found {problem.found}",
            kind="bad_file",
            hint=(
                "see all with ",
                Option("verify", verb="inspect"),
                "; quantize the original again",
            ),
        )
