"""Bytes: of the units that sizes are told in, and of one number in the dtypes of a model."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30

HALF_BYTES: Final = 2  # float16 and bfloat16
FLOAT32_BYTES: Final = 4
