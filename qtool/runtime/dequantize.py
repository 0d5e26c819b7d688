"""Packed weights back to floating point, on any device: plain torch, or our kernels on the CPU.

Bit for bit what bitsandbytes' kernels return:

    absmax  = quant_map[q] * nested_absmax + nested_offset    float32, two roundings (double quant)
    weight  = dtype(code[nibble] * absmax)                    product in float32, one rounding
    weight  = dtype(codes * SCB * (1/127))                    INT8, left to right in float32

Layout of the packed bytes: element 2j lies in the high nibble of byte j, 2j+1 in the low one, rows
of [out, in] one after the other; block b covers elements [b*blocksize, (b+1)*blocksize).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qtool.formats.codebooks import CODES, FP4_SIGN_BIT
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantType
from qtool.runtime.dequantize_host import SOURCE_DTYPES, dequantize_blocks, dequantize_rows

INT8_SCALE = 7.874015718698502e-3  # bitsandbytes' literal for 1/127

# Elements that are unpacked at a time: the float32 values and 32-bit indices of one step stay in a
# CPU's caches, while a GPU gets few and large launches.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    *,
    quant_type: QuantType,
    blocksize: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Elements [start, stop) of a 4-bit weight.

    Args:
        packed: uint8 (ceil(n/2), 1) or (ceil(n/2),), contiguous.
        absmax: float32 (ceil(n/blocksize),).
        start: a flat element index; any value, blocks and bytes may be cut.
        stop: one past the last element.
        dtype: what the product is rounded to.

    Returns:
        `dtype` (stop - start,).
    """
    out = torch.empty(stop - start, dtype=dtype, device=packed.device)
    if packed.device.type == "cpu" and start % blocksize == 0 and dtype in SOURCE_DTYPES:
        covered = absmax[start // blocksize : -(-stop // blocksize)]
        codes = packed.reshape(-1)[start // 2 : (stop + 1) // 2]
        dequantize_blocks(codes, covered, quant_type, blocksize, out)
        return out
    step = max(CHUNK_ELEMENTS.get(packed.device.type, 1 << 22) // blocksize, 1) * blocksize
    pairs = _byte_to_pair(quant_type, packed.device)
    flat = packed.reshape(-1)
    aligned = start - start % blocksize
    for begin in range(aligned, stop, step):
        end = min(begin + step, stop)
        indices = flat[begin // 2 : (end + 1) // 2].to(torch.int32)
        values = pairs.index_select(0, indices).view(torch.float32)[: end - begin]
        _scale_blocks(values, absmax[begin // blocksize : -(-end // blocksize)], blocksize)
        first = max(start - begin, 0)
        out[begin + first - start : end - start] = values[first:]
    return out


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, nested_offset: Tensor
) -> Tensor:
    """Double quantization undone.

    Args:
        codes: uint8 (m,).
        nested_absmax: float32 (ceil(m/256),).
        nested_quant_map: float32 (256,), the file's own.
        nested_offset: float32 ().

    Returns:
        absmax: float32 (m,).
    """
    values = nested_quant_map.index_select(0, codes.to(torch.int32))
    _scale_blocks(values, nested_absmax, NESTED_BLOCKSIZE)
    return values.add_(nested_offset)


def dequantize_int8(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an LLM.int8() weight: `codes` int8 (r, c), `scb` float32 (r,) -> `dtype` (r, c)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.device.type == "cpu" and dtype in SOURCE_DTYPES:
        dequantize_rows(codes, scb, out)
        return out
    step = max(CHUNK_ELEMENTS.get(codes.device.type, 1 << 22) // codes.shape[1], 1)
    for begin in range(0, codes.shape[0], step):
        rows = slice(begin, begin + step)
        out[rows] = (codes[rows] * scb[rows, None]).mul_(INT8_SCALE)
    return out


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Multiply each block of `values` (k,) by its entry of `absmax`, in place; the tail too."""
    full = values.numel() // blocksize * blocksize
    if full:
        values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    if full < values.numel():
        values[full:].mul_(absmax[full // blocksize])


@cache
def _byte_to_pair(quant_type: QuantType, device: torch.device) -> Tensor:
    """int64 (256,): entry b is the two float32 values of byte b, the high nibble's first.

    One 8-byte look-up per byte instead of two 4-byte ones per nibble.
    """
    code = torch.from_numpy(CODES[quant_type].copy())
    if quant_type == "fp4":
        code[FP4_SIGN_BIT] = -0.0  # +0 in the table, but the kernels apply the sign bit to zero too
    byte = torch.arange(256)
    pairs = torch.stack((code[byte >> 4], code[byte & 15]), dim=1)  # (256, 2)
    return pairs.contiguous().view(torch.int64).reshape(256).to(device)
