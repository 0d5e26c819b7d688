"""Describes tokens to the copy engine of Hopper and later: the maps that token_copies.cuh reads."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

MAP_BYTES: Final = 128
_ALIGNMENT: Final = 64  # of a map in memory
_BLOCK: Final = 64  # columns, the widest box whose rows are swizzled

# From cuda.h
_UINT16: Final = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16
_NO_INTERLEAVE: Final = 0
_SWIZZLE_128B: Final = 3
_L2_PROMOTION_256B: Final = 3
_ZEROS: Final = 0  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE

_Sizes = ctypes.c_uint64 * 2
_Strides = ctypes.c_uint64 * 1
_Counts = ctypes.c_uint32 * 2


class TokenMap(ctypes.Structure):
    """What a kernel is given: opaque."""

    _fields_ = (("words", ctypes.c_uint64 * (MAP_BYTES // 8)),)


def fill_map(target: TokenMap, x: int, stride: int, count: int, columns: int, box: int) -> None:
    """Describe activations (count, columns) of 16 bits to the copy engine.

    Tokens and columns beyond are zeros.

    Args:
        target: filled.
        x: their address, 16-byte aligned.
        stride: from token to token, in values; a multiple of 8, and at least `columns`. Of one
            token it does not matter.
        box: tokens that are copied at once, 64 columns of each.

    Raises:
        RuntimeError: the driver refuses.
    """
    space = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    aligned = -(-ctypes.addressof(space) // _ALIGNMENT) * _ALIGNMENT
    status = _encode()(
        aligned,
        _UINT16,
        2,
        x,
        _Sizes(columns, count),
        _Strides((stride if count > 1 else columns) * 2),
        _Counts(_BLOCK, box),
        _Counts(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _ZEROS,
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: CUDA error {status}")
    ctypes.memmove(ctypes.addressof(target), aligned, MAP_BYTES)


@cache
def _encode() -> Any:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, enum = ctypes.c_void_p, ctypes.c_int
    encode.argtypes = (
        pointer,
        enum,
        ctypes.c_uint32,
        pointer,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
        enum,
        enum,
        enum,
        enum,
    )
    return encode
