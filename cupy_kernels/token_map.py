"""Describes tokens and weights to the copy engine of Hopper, as token_copies.cuh wants them."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any, Final

MAP_BYTES: Final = 128
_ALIGNMENT: Final = 64  # of a map in memory
_BLOCK: Final = 64  # columns, the widest box whose rows are swizzled

# From cuda.h
_UINT8: Final = 0  # CU_TENSOR_MAP_DATA_TYPE_UINT8
_UINT16: Final = 1
_NO_INTERLEAVE: Final = 0
_SWIZZLES: Final = {4: 1, 8: 2}  # CU_TENSOR_MAP_SWIZZLE_32B and 64B, by bits of a weight
_SWIZZLE_128B: Final = 3
_L2_PROMOTION_256B: Final = 3
_ZEROS: Final = 0  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


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
    strides = ((stride if count > 1 else columns) * 2,)
    _fill(target, _UINT16, x, (columns, count), strides, (_BLOCK, box), _SWIZZLE_128B)


def fill_map_of_chunks(
    target: TokenMap,
    x: int,
    stride: int,
    count: int,
    columns: int,
    *,
    chunk: int,
    box: tuple[int, int],
) -> None:
    """As `fill_map`, for copies of the same 64 columns of several chunks at once.

    Tokens and chunks beyond are zeros.

    Args:
        columns: whole chunks.
        chunk: columns of it, a multiple of 64.
        box: chunks and tokens that are copied at once, 64 columns of each.

    Raises:
        RuntimeError: the driver refuses.
    """
    blocks = chunk // _BLOCK  # which lie nearer than chunks: strides need not ascend
    sizes = (_BLOCK, count, columns // chunk, blocks)
    strides = ((stride if count > 1 else columns) * 2, chunk * 2, _BLOCK * 2)
    num_chunks, num_tokens = box
    _fill(target, _UINT16, x, sizes, strides, (_BLOCK, num_tokens, num_chunks, 1), _SWIZZLE_128B)


def fill_packed_map(
    target: TokenMap, packed: int, columns: int, rows: int, *, bits: int, box: int
) -> None:
    """Describe packed weights (rows, columns) of 4 or 8 bits to the copy engine.

    Rows beyond are zeros.

    Args:
        packed: their address, 16-byte aligned.
        columns: a multiple of 64.
        box: rows that are copied at once, 64 columns of each.

    Raises:
        RuntimeError: the driver refuses.
    """
    row_bytes, box_bytes = columns * bits // 8, _BLOCK * bits // 8
    sizes, boxes = (row_bytes, rows), (box_bytes, box)
    _fill(target, _UINT8, packed, sizes, (row_bytes,), boxes, _SWIZZLES[bits])


def _fill(target: TokenMap, *description: Any) -> None:
    ctypes.memmove(ctypes.addressof(target), _encoded(*description), MAP_BYTES)


@lru_cache(maxsize=256)  # blocks of a network have their activations at the same places
def _encoded(
    dtype: int,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """Sizes from the innermost dimension on; strides in bytes, of all but that one."""
    rank = len(sizes)
    space = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    aligned = -(-ctypes.addressof(space) // _ALIGNMENT) * _ALIGNMENT
    status = _encode()(
        aligned,
        dtype,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        swizzle,
        _L2_PROMOTION_256B,
        _ZEROS,
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: CUDA error {status}")
    return ctypes.string_at(aligned, MAP_BYTES)


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
