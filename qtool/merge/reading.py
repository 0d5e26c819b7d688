"""The merged model's values, made where the writer asks for them: a tile at a time.

What is copied passes through untouched. A merged matrix is made by whole rows, so a tile that
begins or ends inside one makes that row twice; no byte depends on where tiles begin.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.backends.low_rank import LowRankUpdate, add_low_rank, add_squares
from qtool.backends.protocol import Backend, SourceArray
from qtool.checkpoint.reading import ShardReader, TensorReader, open_shard
from qtool.checkpoint.records import Checkpoint, TensorInfo
from qtool.formats.floats import NUMPY_DTYPES, narrow, widen
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.formats.tensors import DTYPE_BITS, SourceDtype, TensorLayout
from qtool.merge.adapter import Adapter, AdapterReader, LowRank
from qtool.merge.plan import SOURCE_DTYPES, MergeSources, PackedSource, Source

# Updates kept in float64: a shard has tiles of two tensors in work, rarely of more.
UPDATES_KEPT: Final = 4
# Rows of a matrix that are looked at together when all of it is needed.
PASS_ELEMENTS: Final = 1 << 20


class MergeReader:
    """Opens readers of merged tensors; what `FolderPlan.open_tensors` wants.

    Args:
        base: the checkpoint that `sources` was made from.
        backend: dequantizes packed weights.
    """

    def __init__(
        self, adapter: Adapter, base: Checkpoint, sources: MergeSources, backend: Backend
    ) -> None:
        self._adapter, self._base, self._sources = adapter, base, sources
        self._backend = backend

    @contextmanager
    def __call__(self, checkpoint: Checkpoint, names: Collection[str]) -> Iterator[TensorReader]:
        """A reader of the tensors of the merged model; its files are opened as they are needed."""
        with ExitStack() as stack:
            files = _BaseFiles(self._base, stack)
            adapter = stack.enter_context(self._adapter.open())
            yield _MergedTensors(self._sources.by_name, files, adapter, self._backend)


class _BaseFiles:
    """The base's shards, opened when the first of their tensors is read."""

    def __init__(self, base: Checkpoint, stack: ExitStack) -> None:
        self._base, self._stack = base, stack
        self._lock = threading.Lock()
        self._readers: dict[str, ShardReader] = {}

    def fill(self, buffer: NDArray[Any], tensor: TensorLayout, start: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        info = cast(TensorInfo, tensor)
        self.reader(info.shard).read_into(buffer, info.offset + start)

    def reader(self, shard: str) -> ShardReader:
        """The open shard."""
        with self._lock:
            if shard not in self._readers:
                reader = open_shard(self._base, shard)
                self._readers[shard] = self._stack.enter_context(reader)
            return self._readers[shard]


class _MergedTensors:
    def __init__(
        self,
        sources: Any,
        files: _BaseFiles,
        adapter: AdapterReader,
        backend: Backend,
    ) -> None:
        self._sources: dict[str, Source] = sources
        self._files, self._adapter, self._backend = files, adapter, backend
        self._lock = threading.Lock()
        self._updates: OrderedDict[str, LowRankUpdate] = OrderedDict()

    def read_into(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        """See `TensorReader`."""
        source = self._sources[tensor.name]
        if source.reason == "copied":
            self._files.fill(buffer, cast(TensorInfo, source.base), start)
            return
        dtype = cast(SourceDtype, tensor.dtype)
        values = buffer.reshape(-1).view(np.uint8).view(NUMPY_DTYPES[dtype])
        first = start * 8 // DTYPE_BITS[dtype]
        last = first + values.size
        if len(tensor.shape) != 2 or not values.size:
            values[:] = self._vector(tensor, source).reshape(-1)[first:last]
            return
        num_columns = tensor.shape[1]
        rows = range(first // num_columns, -(-last // num_columns))
        step = max(1, PASS_ELEMENTS // num_columns)
        for row in rows[::step]:
            stop = min(row + step, rows.stop)
            part = self._block(tensor, source, slice(row, stop), slice(0, num_columns)).reshape(-1)
            begin = max(first, row * num_columns)
            end = min(last, stop * num_columns)
            skipped = begin - row * num_columns
            values[begin - first : end - first] = part[skipped : skipped + end - begin]

    def read_columns(self, tensor: TensorInfo, buffer: NDArray[Any], start: int) -> None:
        """See `TensorReader`."""
        num_rows, num_columns = buffer.shape
        source = self._sources[tensor.name]
        columns = slice(start, start + num_columns)
        step = max(1, PASS_ELEMENTS // max(1, num_columns))
        for row in range(0, num_rows, step):
            rows = slice(row, min(row + step, num_rows))
            buffer[rows] = self._block(tensor, source, rows, columns)

    # -- values ---------------------------------------------------------------------------------

    def _block(
        self, tensor: TensorInfo, source: Source, rows: slice, columns: slice
    ) -> SourceArray:
        """A part of a matrix, in the dtype of the output."""
        to = cast(SourceDtype, tensor.dtype)
        base, dtype = self._base_block(source, rows, columns, tensor.shape)
        if source.update is None:
            return base if dtype == to else cast(SourceArray, narrow(widen(base, dtype), to))
        update = self._update(tensor, source, source.update)
        return add_low_rank(base, dtype, update.of(rows, columns), to)

    def _vector(self, tensor: TensorInfo, source: Source) -> NDArray[Any]:
        """A whole small tensor: a bias that something is added to, a norm that was replaced."""
        base = cast(TensorInfo, source.base)
        dtype, to = cast(SourceDtype, base.dtype), cast(SourceDtype, tensor.dtype)
        values = np.empty(base.num_elements, NUMPY_DTYPES[dtype])
        self._fill(values, base, 0, in_adapter=source.in_adapter)
        if source.added_bias is None:
            return values if dtype == to else narrow(widen(values, dtype), to)
        bias = self._adapter.read_floats(cast(TensorInfo, source.added_bias.bias))
        one, scale = np.ones((1, 1), np.float32), source.added_bias.scale
        update = LowRankUpdate(one, bias.astype(np.float64)[None], scale)
        return add_low_rank(cast(SourceArray, values.reshape(1, -1)), dtype, update, to)

    def _base_block(
        self, source: Source, rows: slice, columns: slice, shape: tuple[int, ...]
    ) -> tuple[SourceArray, SourceDtype]:
        """The same part of what is merged onto, in its own dtype."""
        if isinstance(source.base, PackedSource):
            if source.base.transposed:
                values, dtype = self._dequantize(source.base, columns)
                return cast(SourceArray, values[:, rows].T), dtype
            values, dtype = self._dequantize(source.base, rows)
            return cast(SourceArray, values[:, columns]), dtype
        dtype = cast(SourceDtype, source.base.dtype)
        num_columns = shape[1]
        stored = np.empty((rows.stop - rows.start, num_columns), NUMPY_DTYPES[dtype])
        start = rows.start * num_columns * stored.itemsize
        if columns == slice(0, num_columns):
            self._fill(stored, source.base, start, in_adapter=source.in_adapter)
            return cast(SourceArray, stored), dtype
        part = np.empty((len(stored), columns.stop - columns.start), stored.dtype)
        reader = self._adapter if source.in_adapter else self._files.reader(source.base.shard)
        reader.read_columns(
            source.base.offset + start,
            rows=len(stored),
            row_bytes=num_columns * part.itemsize,
            col_start_bytes=columns.start * part.itemsize,
            col_num_bytes=part.shape[1] * part.itemsize,
            buffer=part,
        )
        return cast(SourceArray, part), dtype

    def _fill(
        self, values: NDArray[Any], tensor: TensorInfo, start: int, *, in_adapter: bool
    ) -> None:
        if in_adapter:
            self._adapter.read_into(values, tensor.offset + start)
        else:
            self._files.fill(values, tensor, start)

    # -- packed weights -------------------------------------------------------------------------

    def _dequantize(self, source: PackedSource, rows: slice) -> tuple[NDArray[Any], SourceDtype]:
        """Rows of a packed weight [out, in], as every reader of the format gives them."""
        num_columns = source.shape[1]
        if source.state is None:
            codes = np.empty((rows.stop - rows.start, num_columns), np.int8)
            scb = np.empty(len(codes), np.float32)
            self._files.fill(codes, source.weight.weight, rows.start * num_columns)
            self._files.fill(scb, source.weight.statistics["SCB"], 4 * rows.start)
            floats = np.empty(codes.shape, np.float32)
            self._backend.dequantize_int8(codes, scb, "F32", floats)
            return floats, "F32"
        dtype = SOURCE_DTYPES[source.state.dtype]
        first, last = rows.start * num_columns, rows.stop * num_columns
        # Codes, absmax and nested absmax all begin anew at such a multiple.
        group = NESTED_BLOCKSIZE * source.state.blocksize
        begin = first // group * group
        values: Any = np.empty(last - begin, NUMPY_DTYPES[dtype])
        packed = np.empty((last + 1) // 2 - begin // 2, np.uint8)
        self._files.fill(packed, source.weight.weight, begin // 2)
        absmax = self._absmax(source, begin, last)
        self._backend.dequantize_4bit(
            packed, absmax, source.state.quant_type, source.state.blocksize, dtype, values
        )
        return values[first - begin :].reshape(-1, num_columns), dtype

    def _absmax(self, source: PackedSource, begin: int, last: int) -> NDArray[np.float32]:
        """absmax of the blocks of elements [begin, last), double quantization undone."""
        state, statistics = source.state, source.weight.statistics
        assert state is not None
        first_block, last_block = begin // state.blocksize, -(-last // state.blocksize)
        absmax = np.empty(last_block - first_block, np.float32)
        if state.nested_offset is None:
            self._files.fill(absmax, statistics["absmax"], 4 * first_block)
            return absmax
        codes = np.empty(absmax.size, np.uint8)
        self._files.fill(codes, statistics["absmax"], first_block)
        nested = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
        self._files.fill(nested, statistics["nested_absmax"], 4 * (first_block // NESTED_BLOCKSIZE))
        self._backend.dequantize_absmax(codes, nested, np.float32(state.nested_offset), absmax)
        return absmax

    # -- updates --------------------------------------------------------------------------------

    def _update(self, tensor: TensorInfo, source: Source, update: LowRank) -> LowRankUpdate:
        """The update of a whole matrix, read once for all of its tiles."""
        with self._lock:
            if tensor.name not in self._updates:
                self._updates[tensor.name] = self._read_update(tensor, source, update)
                if len(self._updates) > UPDATES_KEPT:
                    self._updates.popitem(last=False)
            self._updates.move_to_end(tensor.name)
            return self._updates[tensor.name]

    def _read_update(self, tensor: TensorInfo, source: Source, update: LowRank) -> LowRankUpdate:
        a, b = self._adapter.read_floats(update.a), self._adapter.read_floats(update.b)
        if source.by_columns:  # the stored matrix is the transpose: (B A)^T = A^T B^T
            a, b = b.T, np.ascontiguousarray(a.T)
        plain = LowRankUpdate(b, np.ascontiguousarray(a, np.float64), update.scale)
        if update.magnitude is None:
            return plain
        norms = np.sqrt(self._squares(tensor, source, plain))
        magnitude = self._adapter.read_floats(update.magnitude).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: told as not finite
            factor = magnitude / norms
        by_row, by_column = (None, factor) if source.by_columns else (factor, None)
        return LowRankUpdate(plain.left, plain.right, plain.scale, by_row, by_column)

    def _squares(
        self, tensor: TensorInfo, source: Source, update: LowRankUpdate
    ) -> NDArray[np.float64]:
        """Sums of the squares of every output's weights, after the update."""
        num_rows, num_columns = tensor.shape
        sums = np.zeros(num_columns if source.by_columns else num_rows)
        step = max(1, PASS_ELEMENTS // max(1, num_columns))
        columns = slice(0, num_columns)
        for row in range(0, num_rows, step):
            rows = slice(row, min(row + step, num_rows))
            base, dtype = self._base_block(source, rows, columns, tensor.shape)
            part = sums if source.by_columns else sums[rows]
            add_squares(
                base, dtype, update.of(rows, columns), by_row=not source.by_columns, sums=part
            )
        return sums
