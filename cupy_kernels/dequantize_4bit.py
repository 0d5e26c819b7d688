"""Launches dequantize_4bit.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from cupy_kernels.launch import THREADS, Launch, ceil_div, check_aligned, cuda_dtype
from cupy_kernels.loader import load_kernel

_BLOCK_TILE = 4 * 256 * (THREADS // 32)  # values per thread block, as in the .cu


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """absmax after double quantization, as addresses.

    Attributes:
        codes: uint8 (m,).
        nested_absmax: float32 (ceil(m/256),).
        nested_code: float32 (256,), the dynamic map.
        nested_offset: float32 (1,), the mean that was taken off.
    """

    codes: int
    nested_absmax: int
    nested_code: int
    nested_offset: int


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("num_values", ctypes.c_int64),
        ("blocksize_log2", ctypes.c_int),
    )


class Dequantize4bit:
    """The inverse of `quantize_4bit` of given bytes, to be queued again and again.

    Nested absmax is decoded on the way.

    Args:
        packed: address of uint8 (ceil(num_values/2),), 16-byte aligned.
        num_values: at least 1.
        absmax: address of float32 (ceil(num_values/blocksize),), or the nested form.
        blocksize: a power of two, at least 8.
        dtype: BF16, F16 or F32.

    Raises:
        ValueError: an unknown dtype or block size, or an address that is not aligned.
    """

    def __init__(
        self,
        packed: int,
        num_values: int,
        absmax: int | NestedAbsmax,
        quant_type: str,
        blocksize: int,
        dtype: str,
    ) -> None:
        if blocksize < 8 or blocksize & (blocksize - 1):
            raise ValueError(f"blocksize {blocksize} is no power of two of at least 8")
        check_aligned(packed=packed)
        nested = isinstance(absmax, NestedAbsmax)
        kernel = load_kernel(
            "dequantize_4bit", TARGET=cuda_dtype(dtype), QUANT_TYPE=quant_type, NESTED=int(nested)
        )
        arguments = _Arguments(
            packed=packed, num_values=num_values, blocksize_log2=blocksize.bit_length() - 1
        )
        if isinstance(absmax, NestedAbsmax):
            arguments.absmax_codes = absmax.codes
            arguments.nested_absmax = absmax.nested_absmax
            arguments.nested_code = absmax.nested_code
            arguments.nested_offset = absmax.nested_offset
        else:
            arguments.absmax = absmax
        grid = (ceil_div(num_values, _BLOCK_TILE),)
        self._launch = Launch(kernel, grid, THREADS, 0, arguments, overlap=False)

    def queue(self, values: int, stream: int) -> None:
        """Queue it on `stream`; `values` is the address of the output (num_values,), aligned."""
        check_aligned(values=values)
        self._launch.arguments.target = values
        self._launch(stream)


def dequantize_4bit(
    packed: int,
    num_values: int,
    absmax: int | NestedAbsmax,
    quant_type: str,
    blocksize: int,
    dtype: str,
    values: int,
    stream: int,
) -> None:
    """Queue the inverse of `quantize_4bit` once, see `Dequantize4bit`."""
    if num_values > 0:
        launch = Dequantize4bit(packed, num_values, absmax, quant_type, blocksize, dtype)
        launch.queue(values, stream)
