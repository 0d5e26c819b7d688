"""What products take that round their activations to INT8 too, as `--int8-threshold` asks for.

Tests hold this module against `qtool.runtime.int8_products`. Nothing is dequantized. Per row of
activations there are codes and absmax, with outliers also the values that are not rounded, and per
column marks and a list; then INT32 sums of as many columns of the result as MAX_SUMS holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qtool.planner.units import HALF_BYTES

MAX_SUMS: Final = 1 << 25
MAX_ROUNDED_ROWS: Final = 2048
SUMS_MULTIPLE: Final = 256
INT32_BYTES: Final = 4
COUNTER_BYTES: Final = 16  # behind the marks


@dataclass(frozen=True, slots=True)
class RoundedProducts:
    """Products of 16-bit activations; without outliers (a threshold of 0) all of x is rounded."""

    has_outliers: bool

    def bytes_at_once(self, tokens: int, columns: int, layers: Sequence[int]) -> int:
        """Beside x (tokens, columns) and the results, where all of x is rounded at once, for layers
        of so many rows one after the other."""
        sums_bytes = max(_sums_bytes(tokens, rows) for rows in layers)
        return self._found_bytes(columns) + self._rounded_bytes(tokens, columns) + sums_bytes

    def bytes_in_pieces(self, tokens: int, columns: int, rows: int) -> int:
        """The same for one layer, where MAX_ROUNDED_ROWS of x are rounded at a time: the next are
        before the last are gone."""
        num_pieces = -(-tokens // MAX_ROUNDED_ROWS)
        piece = -(-tokens // num_pieces)
        rounded_bytes = self._rounded_bytes(piece, columns)
        two_bytes = 2 * rounded_bytes if num_pieces > 1 else 0
        largest_bytes = max(two_bytes, rounded_bytes + _sums_bytes(piece, rows))
        return self._found_bytes(columns) + largest_bytes

    def _found_bytes(self, columns: int) -> int:
        marks_bytes = columns + COUNTER_BYTES
        return self.has_outliers * (marks_bytes + (1 + columns) * INT32_BYTES)

    def _rounded_bytes(self, tokens: int, columns: int) -> int:
        values_bytes = self.has_outliers * HALF_BYTES
        return tokens * (columns * (1 + values_bytes) + INT32_BYTES)


def _sums_bytes(tokens: int, rows: int) -> int:
    """Of two pieces where there are more than one: the next is made before the last is gone.

    A piece may be some columns smaller; so it grows with the tokens, as a plan has to.
    """
    piece_sums = max(MAX_SUMS, tokens * SUMS_MULTIPLE)
    return min(tokens * rows, 2 * piece_sums) * INT32_BYTES
