"""Float values as checkpoints store them: widening to float32, rounding back, subnormals.

bfloat16 travels as its uint16 bits, because NumPy has no such dtype.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.tensors import SourceDtype

NUMPY_DTYPES: Final[dict[SourceDtype, type[np.generic]]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}
SMALLEST_NORMAL: Final = np.float32(2.0**-126)


def widen(values: NDArray[Any], dtype: SourceDtype) -> NDArray[np.float32]:
    """The stored `values` of `dtype` as float32, exactly."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def narrow(values: NDArray[np.float32], dtype: SourceDtype) -> NDArray[Any]:
    """float32 `values` rounded to `dtype`, ties to even; NaN stays NaN."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    with np.errstate(over="ignore"):  # beyond float16's range is infinity, as in torch
        return values.astype(NUMPY_DTYPES[dtype])


def flush_subnormals(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Magnitudes below 2^-126 become zero of the same sign.

    GPUs compiled with fast math, bitsandbytes' among them, treat float32 so. It is part of the
    format here, because every backend must give the same bytes.
    """
    tiny = np.abs(values) < SMALLEST_NORMAL
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def count_nonfinite(values: NDArray[Any], dtype: SourceDtype) -> int:
    """How many stored `values` of `dtype` are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(widen(values, dtype))))
