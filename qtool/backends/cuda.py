"""The CUDA backend: host arrays to the device, through a kernel of `cupy_kernels`, and back.

Every call has a workspace of its own for as long as it runs: a stream and a piece of device memory.
So the copies and kernels of several calling threads overlap, and device memory is bounded by their
number. Copies from and to `host_buffer` memory, which is page-locked, run at the full speed of the
bus; those of other arrays go through the driver's staging buffers.

CuPy is imported, and the context of the device created, on first use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.backends.arguments import check_four_bit, check_int8, check_nested, check_values
from qtool.backends.cpu import num_usable_cores
from qtool.backends.protocol import Reservation, SourceArray
from qtool.errors import Option, QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.formats.precisions import QuantType
from qtool.formats.tensors import SourceDtype

DEFAULT_TILE_BYTES: Final = 16 << 20  # long enough copies that starting them costs little
MIN_TILE_BYTES: Final = 256 << 10
MAX_WORKERS: Final = 6  # fill the bus; more of them take cores from the checksums
_ALIGNMENT_BYTES: Final = 256
_COUNT_BYTES: Final = 8
_OUT_OF_MEMORY: Final = 2  # cudaErrorMemoryAllocation


class CudaBackend:
    """The protocol of `qtool.backends` on the current device of the calling thread."""

    name = "cuda"

    def __init__(self) -> None:
        self._lock = threading.RLock()  # dropped workspaces count themselves out under it
        self._idle: list[_Workspace] = []
        self._device_bytes = 0
        self._peak_device_bytes = 0
        self._page_locked: list[Any] = []
        self._page_locked_bytes = 0
        self._may_page_lock = True

    @property
    def peak_device_bytes(self) -> int:
        """See `Backend.peak_device_bytes`."""
        return self._peak_device_bytes

    @property
    def page_locked_bytes(self) -> int:
        """See `Backend.page_locked_bytes`."""
        return self._page_locked_bytes

    # -- memory ---------------------------------------------------------------------------------

    def reserve(self, num_workers: int | None, tile_bytes: int | None) -> Reservation:
        """See `Backend.reserve`: smaller tiles where the device is short of memory."""
        num_workers = num_workers or min(num_usable_cores(), MAX_WORKERS)
        wanted = granted = tile_bytes or DEFAULT_TILE_BYTES
        while not self._claim(num_workers, granted):
            if granted <= MIN_TILE_BYTES:
                raise _too_small(num_workers, granted)
            granted = max(granted // 2, MIN_TILE_BYTES)
        notes = []
        if granted < wanted:
            notes.append(
                f"the GPU is short of memory: tiles of {granted >> 10:,} KiB instead of "
                f"{wanted >> 10:,}"
            )
        if self._page_lock(1) is None:
            notes.append("no page-locked memory is to be had: copies to the GPU are slower")
        return Reservation(num_workers, granted, tuple(notes))

    def release(self) -> None:
        """See `Backend.release`."""
        with self._lock:
            self._idle.clear()
            self._page_locked.clear()
            self._page_locked_bytes = 0

    def host_buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        """See `Backend.host_buffer`: page-locked, or plain memory where that is refused."""
        memory = self._page_lock(num_bytes)
        if memory is None:
            return np.empty(num_bytes, np.uint8)
        with self._lock:
            self._page_locked.append(memory)
            self._page_locked_bytes += num_bytes
        return np.frombuffer(memory, np.uint8, num_bytes)

    def _page_lock(self, num_bytes: int) -> Any:
        """A buffer of page-locked memory, or None: once refused, it is not asked for again."""
        import cupy

        if not self._may_page_lock or num_bytes == 0:
            return None
        try:
            memory = cupy.cuda.PinnedMemory(num_bytes)
        except cupy.cuda.runtime.CUDARuntimeError:
            self._may_page_lock = False
            return None
        return cupy.cuda.PinnedMemoryPointer(memory, 0)

    def _claim(self, num_workers: int, tile_bytes: int) -> bool:
        """Try to have a workspace for every worker; all or nothing."""
        import cupy

        workspaces: list[_Workspace] = []
        try:
            for _ in range(num_workers):
                workspaces.append(_Workspace(self._count_device_bytes))
                workspaces[-1].claim(tile_bytes, tile_bytes // 2, tile_bytes // 8, _COUNT_BYTES)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            return False
        with self._lock:
            self._idle = workspaces
        return True

    def _count_device_bytes(self, change: int) -> None:
        with self._lock:
            self._device_bytes += change
            self._peak_device_bytes = max(self._peak_device_bytes, self._device_bytes)

    @contextmanager
    def _workspace(self) -> Iterator[_Workspace]:
        with self._lock:
            workspace = self._idle.pop() if self._idle else None
        workspace = workspace or _Workspace(self._count_device_bytes)
        try:
            yield workspace
        finally:
            with self._lock:
                self._idle.append(workspace)

    # -- 4 bit ----------------------------------------------------------------------------------

    def quantize_4bit(
        self,
        values: SourceArray,
        dtype: SourceDtype,
        quant_type: QuantType,
        blocksize: int,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
    ) -> int:
        """See `Backend.quantize_4bit`."""
        from cupy_kernels.quantize_4bit import quantize_4bit

        check_four_bit(values, dtype, blocksize, packed, absmax)
        with self._workspace() as work:
            source, codes, scales, bad = work.claim(
                values.nbytes, packed.nbytes, absmax.nbytes, _COUNT_BYTES
            )
            work.zero(bad, _COUNT_BYTES)
            work.upload(values, source)
            quantize_4bit(
                source, dtype, values.size, quant_type, blocksize, codes, scales, bad, work.stream
            )
            work.download(codes, packed)
            work.download(scales, absmax)
            return work.read_count(bad)

    def dequantize_4bit(
        self,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        quant_type: QuantType,
        blocksize: int,
        dtype: SourceDtype,
        values: SourceArray,
    ) -> None:
        """See `Backend.dequantize_4bit`."""
        from cupy_kernels.dequantize_4bit import dequantize_4bit

        check_four_bit(values, dtype, blocksize, packed, absmax)
        with self._workspace() as work:
            codes, scales, target = work.claim(packed.nbytes, absmax.nbytes, values.nbytes)
            work.upload(packed, codes)
            work.upload(absmax, scales)
            dequantize_4bit(
                codes, values.size, scales, quant_type, blocksize, dtype, target, work.stream
            )
            work.download(target, values)
            work.wait()

    # -- double quantization --------------------------------------------------------------------

    def quantize_absmax(
        self,
        absmax: NDArray[np.float32],
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
    ) -> np.float32:
        """See `Backend.quantize_absmax`."""
        from cupy_kernels.quantize_absmax import quantize_absmax, workspace_bytes

        check_nested(absmax, codes, nested_absmax)
        offset = np.zeros(1, np.float32)
        if absmax.size == 0:
            return np.float32(0)
        sums_bytes = workspace_bytes(absmax.size)
        with self._workspace() as work:
            source, codes_out, nested_out, offset_out, sums = work.claim(
                absmax.nbytes, codes.nbytes, nested_absmax.nbytes, offset.nbytes, sums_bytes
            )
            work.zero(sums, sums_bytes)
            work.upload(absmax, source)
            quantize_absmax(
                source, absmax.size, sums, codes_out, nested_out, offset_out, work.stream
            )
            work.download(codes_out, codes)
            work.download(nested_out, nested_absmax)
            work.download(offset_out, offset)
            work.wait()
        return np.float32(offset[0])

    def dequantize_absmax(
        self,
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
        offset: np.float32,
        absmax: NDArray[np.float32],
    ) -> None:
        """See `Backend.dequantize_absmax`."""
        from cupy_kernels.dequantize_4bit import NestedAbsmax
        from cupy_kernels.dequantize_absmax import dequantize_absmax

        check_nested(absmax, codes, nested_absmax)
        table = dynamic_map()
        with self._workspace() as work:
            mean = np.array([offset], np.float32)
            codes_in, nested_in, table_in, offset_in, target = work.claim(
                codes.nbytes, nested_absmax.nbytes, table.nbytes, mean.nbytes, absmax.nbytes
            )
            work.upload(codes, codes_in)
            work.upload(nested_absmax, nested_in)
            work.upload(table, table_in)
            work.upload(mean, offset_in)
            nested = NestedAbsmax(codes_in, nested_in, table_in, offset_in)
            dequantize_absmax(nested, absmax.size, target, work.stream)
            work.download(target, absmax)
            work.wait()

    # -- INT8 rows ------------------------------------------------------------------------------

    def quantize_int8(
        self,
        rows: SourceArray,
        dtype: SourceDtype,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
    ) -> int:
        """See `Backend.quantize_int8`."""
        from cupy_kernels.quantize_int8_rows import quantize_int8_rows

        check_int8(rows, dtype, codes, scb)
        with self._workspace() as work:
            source, codes_out, scb_out, bad = work.claim(
                rows.nbytes, codes.nbytes, scb.nbytes, _COUNT_BYTES
            )
            work.zero(bad, _COUNT_BYTES)
            work.upload(rows, source)
            num_rows, row_size = rows.shape
            quantize_int8_rows(
                source, dtype, num_rows, row_size, codes_out, scb_out, bad, work.stream
            )
            work.download(codes_out, codes)
            work.download(scb_out, scb)
            return work.read_count(bad)

    def dequantize_int8(
        self,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
        dtype: SourceDtype,
        rows: SourceArray,
    ) -> None:
        """See `Backend.dequantize_int8`."""
        from cupy_kernels.dequantize_int8_rows import dequantize_int8_rows

        check_int8(rows, dtype, codes, scb)
        with self._workspace() as work:
            codes_in, scb_in, target = work.claim(codes.nbytes, scb.nbytes, rows.nbytes)
            work.upload(codes, codes_in)
            work.upload(scb, scb_in)
            num_rows, row_size = rows.shape
            dequantize_int8_rows(codes_in, num_rows, row_size, scb_in, dtype, target, work.stream)
            work.download(target, rows)
            work.wait()

    # -- finiteness -----------------------------------------------------------------------------

    def count_nonfinite(self, values: SourceArray, dtype: SourceDtype) -> int:
        """See `Backend.count_nonfinite`."""
        from cupy_kernels.count_nonfinite import count_nonfinite

        check_values(values, dtype)
        with self._workspace() as work:
            source, bad = work.claim(values.nbytes, _COUNT_BYTES)
            work.zero(bad, _COUNT_BYTES)
            work.upload(values, source)
            count_nonfinite(source, dtype, values.size, bad, work.stream)
            return work.read_count(bad)


def _too_small(num_workers: int, tile_bytes: int) -> QtoolError:
    import cupy

    free_bytes, _ = cupy.cuda.runtime.memGetInfo()
    return QtoolError(
        f"the GPU has {free_bytes >> 20:,} MiB free, too little for {num_workers} tiles of "
        f"{tile_bytes >> 10:,} KiB",
        kind="memory",
        hint=(
            "end what else runs on it (nvidia-smi lists it), or use ",
            Option("backend", "cpu", verb="quantize"),
        ),
    )


class _Workspace:
    """A stream, and device memory that grows to what one call needs."""

    def __init__(self, count_bytes: Callable[[int], None]) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._allocate = cupy.cuda.Memory
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._count_bytes = count_bytes
        self._memory: Any = None
        self._num_bytes = 0

    def __del__(self) -> None:
        self._count_bytes(-self._num_bytes)

    @property
    def stream(self) -> int:
        """Its address, as launchers take it."""
        return int(self._stream.ptr)

    def claim(self, *sizes: int) -> list[int]:
        """Addresses of that many bytes each, valid until the next claim."""
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if total > self._num_bytes:
            self._memory = None  # the old piece first
            self._count_bytes(-self._num_bytes)
            self._num_bytes = 0
            self._memory = self._allocate(total)
            self._count_bytes(total)
            self._num_bytes = total
        return [int(self._memory.ptr) + start for start in starts]

    def zero(self, address: int, num_bytes: int) -> None:
        self._runtime.memsetAsync(address, 0, num_bytes, self.stream)

    def upload(self, array: NDArray[Any], address: int) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def read_count(self, address: int) -> int:
        """The uint64 at `address`, once the stream is through."""
        count = np.zeros(1, np.uint64)
        self.download(address, count)
        self.wait()
        return int(count[0])
