"""The weights that kernels are measured on, and room for all that operations make of them.

The same for host and device: `Array` is a NumPy or a CuPy array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qtool.bench.operations import Operation, Shape, num_absmax, value_bytes
from qtool.formats.floats import NUMPY_DTYPES
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantizedPrecision
from qtool.formats.tensors import SourceDtype

Array = Any
Allocate = Callable[[int, Any], Array]  # (size, dtype) -> an uninitialised array (size,)

ROTATION_BYTES: Final = 512 << 20  # of sources: several times the largest caches of today
MIN_WEIGHTS: Final = 3
MAX_WEIGHTS: Final = 64


@dataclass(frozen=True, slots=True)
class FourBit:
    """What NF4 and FP4 store; the last three only with double quantization."""

    packed: Array  # uint8 (ceil(n/2),)
    absmax: Array  # float32 (m,), m = ceil(n/BLOCKSIZE)
    codes: Array  # uint8 (m,)
    nested_absmax: Array  # float32 (ceil(m/256),)
    offset: Array  # float32 (1,)


@dataclass(frozen=True, slots=True)
class Int8:
    """What LLM.int8() stores."""

    codes: Array  # int8 (n,)
    scb: Array  # float32 (rows,)


@dataclass(frozen=True, slots=True)
class Weight:
    """One random weight, flat; `restored` is where copies and dequantized values go.

    Every precision has room of its own, so that what one quantizes another never dequantizes.
    """

    shape: Shape
    dtype: SourceDtype
    source: Array  # (n,)
    restored: Array  # (n,)
    four_bit: Mapping[QuantizedPrecision, FourBit]
    int8: Int8 | None


def num_weights(shape: Shape, dtype: SourceDtype) -> int:
    """How many weights to rotate over, so that none is still in a cache when its turn comes."""
    wanted = -(-ROTATION_BYTES // value_bytes(shape, dtype))
    return min(max(wanted, MIN_WEIGHTS), MAX_WEIGHTS)


def allocate_weight(
    source: Array, shape: Shape, dtype: SourceDtype, operations: Sequence[Operation], new: Allocate
) -> Weight:
    """A weight around `source` (n,) with room for `operations`."""
    num_values, num_blocks = source.size, num_absmax(shape)
    precisions = {operation.precision for operation in operations}
    return Weight(
        shape,
        dtype,
        source,
        restored=new(num_values, NUMPY_DTYPES[dtype]),
        four_bit={
            precision: FourBit(
                packed=new(-(-num_values // 2), np.uint8),
                absmax=new(num_blocks, np.float32),
                codes=new(num_blocks, np.uint8),
                nested_absmax=new(-(-num_blocks // NESTED_BLOCKSIZE), np.float32),
                offset=new(1, np.float32),
            )
            for precision in sorted(precisions - {"int8"})
        },
        int8=Int8(new(num_values, np.int8), new(shape[0], np.float32))
        if "int8" in precisions
        else None,
    )
