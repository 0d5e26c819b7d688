"""The rows of a packed layer that a prompt dequantizes at a time, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("cupy", exc_type=ImportError)

from qtool.formats.pieces import MAX_DEQUANTIZED_ELEMENTS
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.runtime.decoders.blocks import NotFusable, PackedRows, four_bit_rows, int8_rows
from qtool.runtime.decoders.fused_prompt import Piece, _dequantize_launch, _groups
from qtool.runtime.linear import FourBitLayer, Linear4bit, LinearInt8
from tests.runtime.decoders.cpu_launches import launches_on_the_cpu
from tests.runtime.packed_layers import make_layer, relative_error


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with launches_on_the_cpu():
        yield


def pieces_of(layer) -> list[Piece]:
    find = int8_rows if isinstance(layer, LinearInt8) else four_bit_rows
    rows = PackedRows(*find(layer, "BF16", 0, layer.out_features, bias_at=0))
    return [piece for group in _groups([rows]) for piece in group]


def set_piece_rows(monkeypatch, num_rows: int, columns: int) -> None:
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", num_rows * columns)


@pytest.mark.parametrize("quant", ["nf4", "fp4-dq", "int8"])
@pytest.mark.parametrize(("most", "expected"), [(700, [512, 88]), (300, [256, 256, 88])])
def test_all_pieces_together_are_the_weight(monkeypatch, quant, most, expected):
    layer = make_layer(quant, 600, 128)
    set_piece_rows(monkeypatch, most, 128)
    pieces = pieces_of(layer)
    assert [piece.num_rows for piece in pieces] == expected
    found = torch.empty(600, 128, dtype=torch.bfloat16)
    for piece in pieces:
        launch = _dequantize_launch(piece, "BF16")
        launch.queue(found[piece.start : piece.stop].data_ptr(), 0)
    assert relative_error(found, layer.dequantize()) < 0.01


# 301 rows fit at a time, of which 256 are taken: they are no whole group of so large blocks.
@pytest.mark.parametrize("most", [200, 301])
def test_pieces_that_begin_within_a_group_of_absmax_are_refused(monkeypatch, most):
    layer = make_layer("nf4-dq", 300, 128, blocksize=256)
    assert len(pieces_of(layer)) == 1
    set_piece_rows(monkeypatch, most, 128)
    with pytest.raises(NotFusable, match="groups of absmax"):
        pieces_of(layer)


def test_where_a_group_ends_with_a_piece_large_blocks_are_taken(monkeypatch):
    layer = make_layer("nf4-dq", 600, 128, blocksize=256)
    set_piece_rows(monkeypatch, 512, 128)
    for piece in pieces_of(layer):
        assert piece.start * 128 % (256 * NESTED_BLOCKSIZE) == 0


def test_a_layer_that_fits_only_before_rows_are_rounded_down_is_refused():
    shape = FourBitLayer(6000, 11_008, "nf4", 512, torch.bfloat16, True)
    assert 5888 < shape.out_features <= MAX_DEQUANTIZED_ELEMENTS // shape.in_features
    with pytest.raises(NotFusable, match="groups of absmax"):
        pieces_of(Linear4bit(shape))
