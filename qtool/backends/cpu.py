"""The CPU backend: checks its arguments and calls the Numba kernels.

Numba is imported and kernels are compiled on first use; compiled ones are kept on disk.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.backends import decision_tables
from qtool.backends.arguments import check_four_bit, check_int8, check_nested, check_values
from qtool.backends.decision_tables import INFINITY_BITS
from qtool.backends.protocol import Reservation, SourceArray
from qtool.formats.codebooks import CODES, dynamic_map
from qtool.formats.precisions import QuantType
from qtool.formats.tensors import SourceDtype

# The integers by whose type the kernels tell the dtypes apart.
BIT_DTYPES: Final[dict[SourceDtype, type[np.generic]]] = {
    "BF16": np.uint16,
    "F16": np.int16,
    "F32": np.uint32,
}
# The least magnitude that float16 rounds to infinity: 65520, in BF16 the next above it.
FLOAT16_OVERFLOW_BITS: Final[dict[SourceDtype, int]] = {
    "BF16": 0x4780,
    "F16": 0x7C00,
    "F32": 0x477FF000,
}
DEFAULT_TILE_BYTES = 4 << 20  # input and output of a few workers stay in the cache


class CpuBackend:
    """The protocol of `qtool.backends` on the calling thread.

    Every method releases the GIL. Arrays of a wrong dtype, size or layout raise ValueError.
    """

    name = "cpu"
    peak_device_bytes = 0
    page_locked_bytes = 0

    def reserve(self, num_workers: int | None, tile_bytes: int | None) -> Reservation:
        """See `Backend.reserve`: a worker per core; tiles that stay in its cache."""
        return Reservation(num_workers or num_usable_cores(), tile_bytes or DEFAULT_TILE_BYTES)

    def release(self) -> None:
        """See `Backend.release`: nothing is held."""

    def host_buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        """See `Backend.host_buffer`."""
        return np.empty(num_bytes, np.uint8)

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
        from qtool.backends import cpu_kernels as kernels

        check_four_bit(values, dtype, blocksize, packed, absmax)
        quantize: Callable[..., int]
        if dtype == "F32":
            bits: NDArray[Any] = values.view(np.uint32)
            quantize = partial(kernels.quantize_4bit_f32, quant_type == "nf4", blocksize)
        else:
            bits = values.view(np.uint16)
            tables = decision_tables.search_tables(dtype, quant_type)
            order = decision_tables.CODE_ORDER[quant_type]
            scale = decision_tables.absmax_values(dtype)
            quantize = partial(kernels.quantize_4bit_16bit, tables, order, scale, blocksize)
        whole = bits.size - bits.size % blocksize
        num_bad = quantize(bits[:whole], packed[: whole // 2], absmax[: whole // blocksize])
        if whole < bits.size:  # the kernels take whole blocks
            last, last_packed = np.zeros(blocksize, bits.dtype), np.empty(blocksize // 2, np.uint8)
            last[: bits.size - whole] = bits[whole:]
            num_bad += quantize(last, last_packed, absmax[-1:])
            packed[whole // 2 :] = last_packed[: packed.size - whole // 2]
        return int(num_bad)

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
        from qtool.backends import cpu_kernels as kernels

        check_four_bit(values, dtype, blocksize, packed, absmax)
        bits, code = _bits(values, dtype), CODES[quant_type]
        dequantize = partial(kernels.dequantize_4bit, code, blocksize)
        whole = bits.size - bits.size % blocksize
        dequantize(packed[: whole // 2], absmax[: whole // blocksize], bits[:whole])
        if whole < bits.size:  # the kernels take whole blocks
            last, last_packed = np.empty(blocksize, bits.dtype), np.zeros(blocksize // 2, np.uint8)
            last_packed[: packed.size - whole // 2] = packed[whole // 2 :]
            dequantize(last_packed, absmax[-1:], last)
            bits[whole:] = last[: bits.size - whole]

    def quantize_absmax(
        self,
        absmax: NDArray[np.float32],
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
    ) -> np.float32:
        """See `Backend.quantize_absmax`."""
        from qtool.backends import cpu_kernels as kernels

        check_nested(absmax, codes, nested_absmax)
        if absmax.size == 0:
            return np.float32(0)
        offset = np.float32(kernels.mean_in_fixed_order(absmax))
        kernels.quantize_absmax(
            absmax,
            offset,
            decision_tables.dynamic_guesses(),
            decision_tables.dynamic_steps(),
            codes,
            nested_absmax,
        )
        return offset

    def dequantize_absmax(
        self,
        codes: NDArray[np.uint8],
        nested_absmax: NDArray[np.float32],
        offset: np.float32,
        absmax: NDArray[np.float32],
    ) -> None:
        """See `Backend.dequantize_absmax`."""
        from qtool.backends import cpu_kernels as kernels

        check_nested(absmax, codes, nested_absmax)
        kernels.dequantize_absmax(codes, nested_absmax, np.float32(offset), dynamic_map(), absmax)

    def quantize_int8(
        self,
        rows: SourceArray,
        dtype: SourceDtype,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
    ) -> int:
        """See `Backend.quantize_int8`."""
        from qtool.backends import cpu_kernels as kernels

        check_int8(rows, dtype, codes, scb)
        limits = INFINITY_BITS[dtype], FLOAT16_OVERFLOW_BITS[dtype]
        bits, row_size = _bits(rows, dtype), rows.shape[1]
        return int(kernels.quantize_int8(*limits, row_size, bits, codes.reshape(-1), scb))

    def dequantize_int8(
        self,
        codes: NDArray[np.int8],
        scb: NDArray[np.float32],
        dtype: SourceDtype,
        rows: SourceArray,
    ) -> None:
        """See `Backend.dequantize_int8`."""
        from qtool.backends import cpu_kernels as kernels

        check_int8(rows, dtype, codes, scb)
        kernels.dequantize_int8(rows.shape[1], codes.reshape(-1), scb, _bits(rows, dtype))

    def count_nonfinite(self, values: SourceArray, dtype: SourceDtype) -> int:
        """See `Backend.count_nonfinite`."""
        from qtool.backends import cpu_kernels as kernels

        check_values(values, dtype)
        return int(kernels.count_nonfinite(INFINITY_BITS[dtype], _bits(values, dtype)))


def _bits(values: SourceArray, dtype: SourceDtype) -> NDArray[Any]:
    """`values`, flat, as the kernels take them."""
    return values.reshape(-1).view(BIT_DTYPES[dtype])


def num_usable_cores() -> int:
    """Cores that this process may run on (containers and taskset included)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def describe_cpu() -> str:
    """What the kernels run on, for people: usable cores and vector instructions."""
    cores = num_usable_cores()
    return f"{cores} {'core' if cores == 1 else 'cores'}, {vector_instructions()}"


def vector_instructions() -> str:
    """The widest vector instructions that Numba will use, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}
    return next((known[flag] for flag in known if flag in flags), platform.machine())
