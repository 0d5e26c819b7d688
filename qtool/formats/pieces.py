"""How many rows of a packed weight become floating point at a time.

    step = rows_at_a_time(in_features)

Here because those who dequantize and those who plan the memory for it hold to the same rule.
"""

from __future__ import annotations

from typing import Final

from qtool.formats.precisions import NESTED_BLOCKSIZE

# The largest piece of a weight that exists in floating point at a time: 128 MiB in bfloat16. Layers
# beyond it (the MLP of a 70B model) are multiplied in several pieces of whole rows.
MAX_DEQUANTIZED_ELEMENTS: Final = 1 << 26
# So many rows of whole blocks end with a whole group of nested absmax.
PIECE_ROWS: Final = NESTED_BLOCKSIZE


def rows_at_a_time(columns: int) -> int:
    """How many rows of so many columns make a piece: a multiple of PIECE_ROWS where so many fit
    into MAX_DEQUANTIZED_ELEMENTS, and at least one."""
    rows = max(MAX_DEQUANTIZED_ELEMENTS // columns, 1)
    return rows - rows % PIECE_ROWS if rows >= PIECE_ROWS else rows
