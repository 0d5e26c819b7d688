"""Figures of a wrong kernel are worth nothing: results against the reference, in the same run.

The reference is that of `qtool.formats`, in NumPy. It is slow, so it looks at the beginning and the
end of a weight; the bytes of a whole weight are a matter for the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.bench.operations import BLOCKSIZE, DTYPE_WORDS, Operation, shape_text
from qtool.bench.weights import Array, Weight
from qtool.errors import QtoolError
from qtool.formats import double_quant, four_bit, int8
from qtool.formats.floats import narrow, widen
from qtool.formats.precisions import NESTED_BLOCKSIZE

CHECKED_VALUES: Final = 1 << 20  # at either end
_GRAIN: Final = BLOCKSIZE * NESTED_BLOCKSIZE  # values that share a nested absmax

ToHost = Callable[[Array], NDArray[Any]]
Found = dict[str, tuple[NDArray[Any], NDArray[Any]]]  # by name: expected, found


def check_result(operation: Operation, weight: Weight, to_host: ToHost) -> None:
    """Compare what `operation` has just made of `weight`, byte for byte.

    Raises:
        QtoolError: internal, naming the first byte that differs.
    """
    check = _check_int8 if operation.precision == "int8" else _check_four_bit
    for name, (expected, found) in check(operation, weight, to_host).items():
        expected_bytes, found_bytes = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (expected, found)
        )
        wrong = np.flatnonzero(expected_bytes != found_bytes)
        if wrong.size:
            raise _differs(operation, weight, name, wrong, expected_bytes, found_bytes)


def _check_four_bit(operation: Operation, weight: Weight, to_host: ToHost) -> Found:
    stored = weight.four_bit[operation.precision]
    found: Found = {}
    if operation.direction == "quantize" and operation.format.double_quant:
        codes, nested_absmax, offset = double_quant.quantize_absmax(to_host(stored.absmax))
        found["absmax codes"] = codes, to_host(stored.codes)
        found["nested_absmax"] = nested_absmax, to_host(stored.nested_absmax)
        found["offset"] = np.array([offset]), to_host(stored.offset)
    for part in _both_ends(weight.source.size, _GRAIN):
        blocks = slice(part.start // BLOCKSIZE, -(-part.stop // BLOCKSIZE))
        packed = to_host(stored.packed[part.start // 2 : -(-part.stop // 2)])
        if operation.direction == "quantize":
            values = widen(to_host(weight.source[part]), weight.dtype)
            codes, absmax = four_bit.quantize_4bit(values, operation.format.quant_type, BLOCKSIZE)
            found[f"packed from {part.start}"] = codes, packed
            found[f"absmax from {part.start}"] = absmax, to_host(stored.absmax[blocks])
            continue
        if operation.format.double_quant:
            nested = slice(blocks.start // NESTED_BLOCKSIZE, -(-blocks.stop // NESTED_BLOCKSIZE))
            codes, scales = to_host(stored.codes[blocks]), to_host(stored.nested_absmax[nested])
            absmax = double_quant.dequantize_absmax(codes, scales, to_host(stored.offset)[0])
        else:
            absmax = to_host(stored.absmax[blocks])
        values = four_bit.dequantize_4bit(
            packed, absmax, operation.format.quant_type, BLOCKSIZE, part.stop - part.start
        )
        restored = to_host(weight.restored[part])
        found[f"values from {part.start}"] = narrow(values, weight.dtype), restored
    return found


def _check_int8(operation: Operation, weight: Weight, to_host: ToHost) -> Found:
    assert weight.int8 is not None
    num_columns = weight.shape[1]
    found: Found = {}
    for part in _both_ends(weight.source.size, num_columns):
        rows = slice(part.start // num_columns, part.stop // num_columns)
        codes = to_host(weight.int8.codes[part]).reshape(-1, num_columns)
        scb = to_host(weight.int8.scb[rows])
        if operation.direction == "quantize":
            values = to_host(weight.source[part]).reshape(-1, num_columns)
            expected_codes, expected_scb = int8.quantize_int8(values, weight.dtype)
            found[f"codes from {part.start}"] = expected_codes, codes
            found[f"SCB from {rows.start}"] = expected_scb, scb
        else:
            values = narrow(int8.dequantize_int8(codes, scb), weight.dtype)
            found[f"values from {part.start}"] = values, to_host(weight.restored[part])
    return found


def _both_ends(size: int, grain: int) -> list[slice]:
    """The first and the last CHECKED_VALUES or so, cut at multiples of `grain`."""
    length = min(size, -(-CHECKED_VALUES // grain) * grain)
    last = (size - length) // grain * grain
    return [slice(0, length), slice(last, size)]


def _differs(
    operation: Operation,
    weight: Weight,
    name: str,
    wrong: NDArray[np.intp],
    expected: NDArray[np.uint8],
    found: NDArray[np.uint8],
) -> QtoolError:
    first = int(wrong[0])
    return QtoolError(
        f"{operation.name} {DTYPE_WORDS[weight.dtype]} {shape_text(weight.shape)}: {wrong.size} "
        f"bytes of {name} differ from the reference; byte {first}: expected {expected[first]}, "
        f"found {found[first]}",
        kind="internal",
        hint="this is a bug in a kernel, so nothing was measured; please report it",
    )
