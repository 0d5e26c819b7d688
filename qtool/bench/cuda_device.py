"""qtool's CUDA kernels on arrays that lie on the device, timed by the device itself.

Everything runs on the default stream, where torch's and with it bitsandbytes' kernels run too, so
that one pair of events times them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from qtool.bench.contenders import Run, Sample
from qtool.bench.operations import BLOCKSIZE, Operation, Shape, stored_bytes, value_bytes
from qtool.bench.random_weights import STANDARD_DEVIATION
from qtool.bench.weights import Array, Weight, allocate_weight, num_weights
from qtool.errors import Option, QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.formats.tensors import SourceDtype

DEFAULT_STREAM: Final = 0
LEAD_IN_RUNS: Final = 3  # they run while the timed ones are queued: the device is never idle
_WORKING_SPACE: Final = 1.5  # random numbers, and the results that other libraries allocate


class CudaClock:
    """Events around a batch of runs, so that the gaps between launches from Python do not count."""

    runs_per_sample = 10

    def time(self, run: Run, first: int) -> Sample:
        """See `Clock.time`."""
        import cupy

        stream = cupy.cuda.Stream.null
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        for i in range(LEAD_IN_RUNS):
            run(first + i)
        start.record(stream)
        launch_start_s = time.perf_counter()
        for i in range(LEAD_IN_RUNS, LEAD_IN_RUNS + self.runs_per_sample):
            run(first + i)
        launch_s = time.perf_counter() - launch_start_s
        end.record(stream)
        end.synchronize()
        batch_s = cupy.cuda.get_elapsed_time(start, end) * 1e-3
        return Sample(batch_s / self.runs_per_sample, launch_s / self.runs_per_sample)


class CudaDevice:
    """See `Device`: the current GPU. Launchers take addresses, which the caller's arrays keep."""

    def __init__(self) -> None:
        import cupy

        self.clock = CudaClock()
        self._bad_count = cupy.zeros(1, cupy.uint64)
        self._dynamic_map = cupy.asarray(dynamic_map())

    def make_weights(
        self, shape: Shape, dtype: SourceDtype, operations: Sequence[Operation]
    ) -> list[Weight]:
        """See `Device.make_weights`."""
        import cupy

        count = num_weights(shape, dtype)
        stored = sum(stored_bytes(shape, precision) for precision in _precisions(operations))
        _require_memory(int(count * (2 * value_bytes(shape, dtype) + stored) * _WORKING_SPACE))
        return [
            allocate_weight(_random_source(shape, dtype), shape, dtype, operations, cupy.empty)
            for _ in range(count)
        ]

    def bind_copy(self, weight: Weight) -> Callable[[], object]:
        """See `Device.bind_copy`: the driver's own copy from device memory to device memory."""
        import cupy

        runtime = cupy.cuda.runtime
        kind = runtime.memcpyDeviceToDevice
        source, target = weight.source, weight.restored
        return partial(
            runtime.memcpyAsync, _at(target), _at(source), source.nbytes, kind, DEFAULT_STREAM
        )

    def bind(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        """See `Device.bind`."""
        if operation.precision == "int8":
            return self._bind_int8(operation, weight)
        if operation.direction == "quantize":
            return self._bind_quantize_4bit(operation, weight)
        return self._bind_dequantize_4bit(operation, weight)

    def to_host(self, array: Array) -> NDArray[Any]:
        """See `Device.to_host`."""
        return cast(NDArray[Any], array.get())

    def release(self) -> None:
        """See `Device.release`."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def close(self) -> None:
        """See `Device.close`."""

    # -- one operation each ---------------------------------------------------------------------

    def _bind_quantize_4bit(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        import cupy

        from cupy_kernels.quantize_4bit import quantize_4bit
        from cupy_kernels.quantize_absmax import quantize_absmax, workspace_bytes

        stored, num_values = weight.four_bit[operation.precision], weight.source.size
        quantize = partial(
            quantize_4bit,
            _at(weight.source),
            weight.dtype,
            num_values,
            operation.format.quant_type,
            BLOCKSIZE,
            _at(stored.packed),
            _at(stored.absmax),
            _at(self._bad_count),
            DEFAULT_STREAM,
        )
        if not operation.format.double_quant:
            return quantize
        workspace = cupy.zeros(workspace_bytes(stored.absmax.size), cupy.uint8)

        def quantize_twice() -> None:
            quantize()
            quantize_absmax(
                _at(stored.absmax),
                stored.absmax.size,
                _at(workspace),
                _at(stored.codes),
                _at(stored.nested_absmax),
                _at(stored.offset),
                DEFAULT_STREAM,
            )

        return quantize_twice

    def _bind_dequantize_4bit(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        from cupy_kernels.dequantize_4bit import Dequantize4bit, NestedAbsmax

        stored = weight.four_bit[operation.precision]
        absmax: int | NestedAbsmax = _at(stored.absmax)
        if operation.format.double_quant:
            absmax = NestedAbsmax(
                _at(stored.codes),
                _at(stored.nested_absmax),
                _at(self._dynamic_map),
                _at(stored.offset),
            )
        launch = Dequantize4bit(
            _at(stored.packed),
            weight.source.size,
            absmax,
            operation.format.quant_type,
            BLOCKSIZE,
            weight.dtype,
        )
        return partial(launch.queue, _at(weight.restored), DEFAULT_STREAM)

    def _bind_int8(self, operation: Operation, weight: Weight) -> Callable[[], object]:
        from cupy_kernels.dequantize_int8_rows import DequantizeInt8Rows
        from cupy_kernels.quantize_int8_rows import quantize_int8_rows

        assert weight.int8 is not None
        num_rows, row_size = weight.shape
        codes, scb = _at(weight.int8.codes), _at(weight.int8.scb)
        if operation.direction == "dequantize":
            launch = DequantizeInt8Rows(codes, num_rows, row_size, scb, weight.dtype)
            return partial(launch.queue, _at(weight.restored), DEFAULT_STREAM)
        return partial(
            quantize_int8_rows,
            _at(weight.source),
            weight.dtype,
            num_rows,
            row_size,
            codes,
            scb,
            _at(self._bad_count),
            DEFAULT_STREAM,
        )


def _at(array: Array) -> int:
    """Its address."""
    return int(array.data.ptr)


def _random_source(shape: Shape, dtype: SourceDtype) -> Array:
    """Gaussian values as `dtype` is stored, (n,) on the device; see `random_weights`."""
    import cupy

    values = cupy.random.standard_normal(shape[0] * shape[1], dtype=cupy.float32)
    values *= STANDARD_DEVIATION
    if dtype == "BF16":
        return values.view(cupy.uint16)[1::2].copy()
    return values.astype(np.float16) if dtype == "F16" else values


def _precisions(operations: Sequence[Operation]) -> set[Any]:
    return {operation.precision for operation in operations}


def _require_memory(num_bytes: int) -> None:
    import cupy

    free_bytes, _ = cupy.cuda.runtime.memGetInfo()
    if num_bytes > free_bytes:
        raise QtoolError(
            f"the weights to measure need {num_bytes >> 20:,} MiB of GPU memory, "
            f"{free_bytes >> 20:,} MiB are free",
            kind="memory",
            hint=(
                "take a smaller ",
                Option("shape"),
                ", or end what else runs on the GPU (nvidia-smi lists it)",
            ),
        )
