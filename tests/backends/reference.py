"""The backend protocol carried out by the reference arithmetic of `qtool.formats`."""

from __future__ import annotations

import numpy as np

from qtool.formats import double_quant, floats, four_bit, int8


class ReferenceBackend:
    name = "reference"

    def quantize_4bit(self, values, dtype, quant_type, blocksize, packed, absmax):
        wide = floats.widen(values, dtype)
        packed[:], absmax[:] = four_bit.quantize_4bit(wide, quant_type, blocksize)
        return floats.count_nonfinite(values, dtype)

    def dequantize_4bit(self, packed, absmax, quant_type, blocksize, dtype, values):
        wide = four_bit.dequantize_4bit(packed, absmax, quant_type, blocksize, values.size)
        values[:] = floats.narrow(wide, dtype)

    def quantize_absmax(self, absmax, codes, nested_absmax):
        codes[:], nested_absmax[:], offset = double_quant.quantize_absmax(absmax)
        return offset

    def dequantize_absmax(self, codes, nested_absmax, offset, absmax):
        absmax[:] = double_quant.dequantize_absmax(codes, nested_absmax, offset)

    def quantize_int8(self, rows, dtype, codes, scb):
        codes[:], scb[:] = int8.quantize_int8(rows, dtype)
        return floats.count_nonfinite(floats.narrow(floats.widen(rows, dtype), "F16"), "F16")

    def dequantize_int8(self, codes, scb, dtype, rows):
        rows[:] = floats.narrow(int8.dequantize_int8(codes, scb), dtype)

    def count_nonfinite(self, values, dtype):
        return floats.count_nonfinite(values, dtype)


def quantize_4bit(backend, values, dtype, quant_type, blocksize):
    """Packed bytes and absmax in fresh arrays that start with other bytes than zero."""
    packed = np.full(-(-values.size // 2), 0xA5, np.uint8)
    absmax = np.full(-(-values.size // blocksize), -7, np.float32)
    num_bad = backend.quantize_4bit(values, dtype, quant_type, blocksize, packed, absmax)
    return packed, absmax, num_bad


def dequantize_4bit(backend, packed, absmax, quant_type, blocksize, dtype, num_values):
    values = np.full(num_values, 3, floats.NUMPY_DTYPES[dtype])
    backend.dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, values)
    return values


def quantize_absmax(backend, absmax):
    codes = np.full(absmax.size, 0xA5, np.uint8)
    nested_absmax = np.full(-(-absmax.size // 256), -7, np.float32)
    offset = backend.quantize_absmax(absmax, codes, nested_absmax)
    return codes, nested_absmax, offset


def quantize_int8(backend, rows, dtype):
    codes = np.full(rows.shape, 0x5A, np.int8)
    scb = np.full(rows.shape[0], -7, np.float32)
    num_bad = backend.quantize_int8(rows, dtype, codes, scb)
    return codes, scb, num_bad


def assert_same_bits(found, expected, what=""):
    """Equal to the bit, but any NaN equals any other; says where and how they differ."""
    found, expected = np.asarray(found).reshape(-1), np.asarray(expected).reshape(-1)
    assert found.dtype == expected.dtype and found.size == expected.size, what
    bits = np.dtype(f"u{found.dtype.itemsize}")
    differs = found.view(bits) != expected.view(bits)
    if found.dtype.kind == "f":
        differs &= ~(np.isnan(found) & np.isnan(expected))
    where = np.flatnonzero(differs)[:5]
    assert not where.size, (
        f"{what}: {np.count_nonzero(differs)} of {found.size} differ, first at "
        + ", ".join(f"[{i}] {found[i]!r} != {expected[i]!r}" for i in where)
    )
