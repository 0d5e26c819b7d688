"""Tensors as safetensors files describe them: dtype names, sizes, layouts.

dtype names are safetensors' ("BF16", "F32", "U8", ...), sizes are bytes. Pure data; no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

# Bits per element, as the safetensors format defines its dtypes.
DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The dtypes that qtool quantizes from, with torch's names for them.
SourceDtype = Literal["BF16", "F16", "F32"]
TORCH_NAMES: Final[dict[SourceDtype, str]] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a safetensors file, without its place: name, dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data; sub-byte dtypes are rounded up to whole bytes."""
        return (self.num_elements * DTYPE_BITS[self.dtype] + 7) // 8
