"""LLM.int8() weight rows, the reference.

Every weight is first rounded to float16, which the format prescribes; then per row

    SCB  = max |w|                      NaN does not count; 0 where there is nothing else
    code = round(w * (127 * (1/SCB)))   ties to even; float32, each step rounded, the reciprocal as
                                        in `reciprocal.py`

and read back as code * SCB * (1/127). What comes out NaN has code 0: rows of zeros, NaN itself,
and infinities (inf * 0); beside an infinity everything finite is 0. So do bitsandbytes' CUDA
kernels, whose fast division multiplies by the reciprocal.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.floats import narrow, widen
from qtool.formats.reciprocal import reciprocal
from qtool.formats.tensors import SourceDtype

INVERSE_127: Final = np.float32(7.874015718698502e-3)


def quantize_int8(
    rows: NDArray[Any], dtype: SourceDtype
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`rows` (r, c) of `dtype` -> codes int8 (r, c), SCB float32 (r,)."""
    weights = narrow(widen(rows, dtype), "F16").astype(np.float32)
    scb = np.where(np.isnan(weights), 0, np.abs(weights)).max(axis=1, initial=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = weights * (np.float32(127) * reciprocal(scb))[:, None]
    return np.where(np.isnan(scaled), 0, np.rint(scaled)).astype(np.int8), scb


def dequantize_int8(codes: NDArray[np.int8], scb: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (r, c), two roundings; round to the wanted dtype with `floats.narrow`."""
    with np.errstate(invalid="ignore"):
        return codes.astype(np.float32) * scb[:, None] * INVERSE_127
