"""Gaussian weights as they lie in files, fast: several threads, blocks that stay in the cache.

Bits of zeros or of a repeated pattern would be measured too well: memory and caches compress them,
and a GPU's power draw, and with it its clock, depends on the bits that flip.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.formats.tensors import SourceDtype

STANDARD_DEVIATION: Final = np.float32(0.02)  # as transformers initializes weights
_BLOCK_VALUES: Final = 1 << 17


def fill_with_gaussians(values: NDArray[Any], dtype: SourceDtype, seed: tuple[int, ...]) -> None:
    """Fill `values` (n,), as `dtype` is stored: uint16 bits for BF16, which are cut, not rounded.

    The same `seed` gives the same values. Releases the GIL for most of its time.
    """
    generator = np.random.Generator(np.random.SFC64(seed))
    block = np.empty(min(_BLOCK_VALUES, values.size), np.float32)
    for start in range(0, values.size, _BLOCK_VALUES):
        part = values[start : start + _BLOCK_VALUES]
        gaussians = block[: part.size]
        generator.standard_normal(dtype=np.float32, out=gaussians)
        gaussians *= STANDARD_DEVIATION
        # The upper half of a little-endian float32 is the bfloat16.
        part[:] = gaussians.view(np.uint16)[1::2] if dtype == "BF16" else gaussians
