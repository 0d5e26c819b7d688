"""How many rows of a packed weight are dequantized at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qtool.formats.pieces import MAX_DEQUANTIZED_ELEMENTS, PIECE_ROWS, rows_at_a_time
from qtool.formats.precisions import NESTED_BLOCKSIZE


@given(st.integers(1, 1 << 30))
def test_as_many_rows_as_fit(columns):
    rows = rows_at_a_time(columns)
    assert rows == 1 or rows * columns <= MAX_DEQUANTIZED_ELEMENTS
    step = PIECE_ROWS if rows >= PIECE_ROWS else 1
    assert (rows + step) * columns > MAX_DEQUANTIZED_ELEMENTS


@given(st.integers(1, MAX_DEQUANTIZED_ELEMENTS // PIECE_ROWS // 64))
def test_a_piece_of_whole_blocks_is_one_of_whole_groups_of_absmax(num_blocks):
    assert rows_at_a_time(num_blocks * 64) * num_blocks % NESTED_BLOCKSIZE == 0
