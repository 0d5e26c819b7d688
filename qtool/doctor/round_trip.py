"""A small tensor through every backend that is installed, compared with the reference formats.

This runs the real kernels, so it finds what no version number shows: a compiler that miscompiles,
a GPU that cannot run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from qtool.backends import BackendChoice, choose_backend
from qtool.backends.protocol import Backend
from qtool.doctor.records import Check
from qtool.errors import QtoolError, name_flag
from qtool.formats import double_quant, floats, four_bit, int8
from qtool.formats.precisions import QuantType

BACKENDS: Final[tuple[BackendChoice, ...]] = tuple(
    choice for choice in get_args(BackendChoice) if choice != "auto"
)
SHAPE: Final = (32, 65)  # 2,080 values: the last block is short
BLOCKSIZE: Final = 64


def check_round_trip(choice: BackendChoice) -> Iterator[Check]:
    """Quantize and dequantize on one backend; every byte must be the reference's."""
    try:
        backend = choose_backend(choice).backend
    except QtoolError as error:
        yield Check(choice, "info", *error.told(name_flag))
        return
    wrong = differing_formats(backend)
    if wrong:
        fix = "reinstall numba (CPU) or cupy (GPU); do not use this backend until it agrees"
        yield Check(backend.name, "fail", f"differs from the reference: {', '.join(wrong)}", fix)
    else:
        yield Check(backend.name, "ok", "nf4, fp4, double quant and int8 are exact, bit for bit")


def differing_formats(backend: Backend) -> list[str]:
    """The formats in which `backend` and the reference disagree; empty for a sound backend."""
    rows: NDArray[np.float32] = np.random.default_rng(0).normal(0, 0.02, SHAPE).astype(np.float32)
    bits: Any = floats.narrow(rows, "BF16")
    wrong: list[str] = []
    for quant_type in get_args(QuantType):
        if not _four_bit_agrees(backend, quant_type, bits.reshape(-1)):
            wrong.append(quant_type)
    if not _absmax_agrees(backend, np.abs(rows).reshape(-1)):
        wrong.append("double quant")
    if not _int8_agrees(backend, bits):
        wrong.append("int8")
    return wrong


def _four_bit_agrees(backend: Backend, quant_type: QuantType, bits: NDArray[np.uint16]) -> bool:
    packed = np.empty(-(-bits.size // 2), np.uint8)
    absmax = np.empty(-(-bits.size // BLOCKSIZE), np.float32)
    values = np.empty_like(bits)
    backend.quantize_4bit(bits, "BF16", quant_type, BLOCKSIZE, packed, absmax)
    backend.dequantize_4bit(packed, absmax, quant_type, BLOCKSIZE, "BF16", values)
    expected = four_bit.quantize_4bit(floats.widen(bits, "BF16"), quant_type, BLOCKSIZE)
    read_back = four_bit.dequantize_4bit(*expected, quant_type, BLOCKSIZE, bits.size)
    return _all_equal((packed, absmax, values), (*expected, floats.narrow(read_back, "BF16")))


def _absmax_agrees(backend: Backend, absmax: NDArray[np.float32]) -> bool:
    codes = np.empty(absmax.size, np.uint8)
    nested_absmax = np.empty(-(-absmax.size // 256), np.float32)
    values = np.empty_like(absmax)
    offset = backend.quantize_absmax(absmax, codes, nested_absmax)
    backend.dequantize_absmax(codes, nested_absmax, offset, values)
    expected = double_quant.quantize_absmax(absmax)
    read_back = double_quant.dequantize_absmax(*expected)
    found = (codes, nested_absmax, np.asarray(offset), values)
    return _all_equal(found, (*expected[:2], np.asarray(expected[2]), read_back))


def _int8_agrees(backend: Backend, bits: NDArray[np.uint16]) -> bool:
    codes = np.empty(bits.shape, np.int8)
    scb = np.empty(bits.shape[0], np.float32)
    values = np.empty_like(bits)
    backend.quantize_int8(bits, "BF16", codes, scb)
    backend.dequantize_int8(codes, scb, "BF16", values)
    expected = int8.quantize_int8(bits, "BF16")
    read_back = floats.narrow(int8.dequantize_int8(*expected), "BF16")
    return _all_equal((codes, scb, values), (*expected, read_back))


def _all_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
