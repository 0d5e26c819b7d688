"""Tiles cover every element once and never split a block or a row."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.formats.precisions import BLOCKSIZES, QuantFormat
from qtool.formats.tensors import TensorLayout
from qtool.quantize.plan import TensorPlan
from qtool.quantize.tiles import cut_tensor, whole_tile_bytes

shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))
tile_sizes = st.integers(1, 1 << 16).map(lambda kib: kib * 4096)


def make(shape, action="quantize", transposed=False):
    source = TensorLayout("w", "BF16", shape)
    return TensorPlan(source, action, "test", (source,), transposed)


@given(shapes, st.sampled_from(BLOCKSIZES), tile_sizes, st.booleans())
def test_tiles_are_contiguous_and_end_on_blocks(shape, blocksize, tile_bytes, transposed):
    tensor = make(shape, transposed=transposed)
    tiles = list(cut_tensor(tensor, QuantFormat("nf4-dq", blocksize), tile_bytes))
    assert tiles[0].start == 0
    for before, after in pairwise(tiles):
        assert after.start == before.start + before.length
        assert after.start % blocksize == 0 and after.start % 2 == 0
        if transposed:
            assert after.start % shape[0] == 0
    assert tiles[-1].start + tiles[-1].length == tensor.source.num_elements


@given(shapes, tile_sizes, st.booleans())
def test_int8_tiles_are_whole_rows(shape, tile_bytes, transposed):
    row = shape[0] if transposed else shape[1]
    tiles = list(cut_tensor(make(shape, transposed=transposed), QuantFormat("int8"), tile_bytes))
    assert all(tile.start % row == 0 and tile.length % row == 0 for tile in tiles)
    assert sum(tile.length for tile in tiles) == shape[0] * shape[1]


@given(shapes, tile_sizes)
def test_copies_are_counted_in_bytes(shape, tile_bytes):
    tiles = list(cut_tensor(make(shape, action="copy"), QuantFormat(), tile_bytes))
    assert sum(tile.source_bytes for tile in tiles) == 2 * shape[0] * shape[1]
    assert all(tile.source_bytes <= tile_bytes for tile in tiles)


def test_int8_rows_without_columns_are_rows_all_the_same():
    tiles = [next(cut_tensor(make(shape), QuantFormat("int8"), 4096)) for shape in [(5, 0), (0, 5)]]
    assert [tile.num_rows for tile in tiles] == [5, 0]


@pytest.mark.parametrize(
    ("asked", "whole"), [(1, 4096), (4096, 4096), (8191, 4096), (1 << 24, 1 << 24)]
)
def test_tiles_are_whole_pages_and_at_least_one(asked, whole):
    assert whole_tile_bytes(asked) == whole


def test_an_empty_tensor_has_one_empty_tile():
    assert [(t.start, t.length) for t in cut_tensor(make((0, 8)), QuantFormat(), 4096)] == [(0, 0)]
