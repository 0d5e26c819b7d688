"""Cutting tensors into tiles: the unit that a worker carries from the source to the output file.

A tile covers whole blocks (4 bit) or whole rows (INT8), so the bytes do not depend on the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qtool.formats.precisions import QuantFormat
from qtool.formats.tensors import DTYPE_BITS
from qtool.quantize.plan import TensorPlan

TILE_GRAIN_BYTES = 4096  # whole pages, and whole values of every dtype


@dataclass(frozen=True, slots=True)
class Tile:
    """`length` units of a tensor from `start` on: elements in output order, or bytes of a copy."""

    tensor: TensorPlan
    start: int
    length: int

    @property
    def source_bytes(self) -> int:
        """Bytes to read for it."""
        if self.tensor.action == "copy":
            return self.length
        return self.length * DTYPE_BITS[self.tensor.source.dtype] // 8

    @property
    def num_rows(self) -> int:
        """Rows of an INT8 weight that it covers: all of them where they are empty."""
        num_rows, num_columns = self.tensor.outputs[0].shape
        return self.length // num_columns if num_columns else num_rows


def whole_tile_bytes(tile_bytes: int) -> int:
    """`tile_bytes` rounded down to what tensors may be cut into."""
    return max(1, tile_bytes // TILE_GRAIN_BYTES) * TILE_GRAIN_BYTES


def cut_tensor(tensor: TensorPlan, fmt: QuantFormat, tile_bytes: int) -> Iterator[Tile]:
    """One tensor's tiles of about `tile_bytes` of source data, at least one block or row each.

    An empty tensor has one empty tile, so that its statistics are written too.
    """
    if tensor.action == "copy":
        total, step = tensor.source.num_bytes, tile_bytes
    else:
        total = tensor.source.num_elements
        grain = _grain_elements(tensor, fmt)
        itemsize = DTYPE_BITS[tensor.source.dtype] // 8
        step = max(1, tile_bytes // itemsize // grain) * grain
    for start in range(0, max(total, 1), step):
        yield Tile(tensor, start, min(step, total - start))


def _grain_elements(tensor: TensorPlan, fmt: QuantFormat) -> int:
    row = tensor.source.shape[0] if tensor.transposed else tensor.source.shape[-1]
    if fmt.is_int8:
        return max(row, 1)
    block = math.lcm(fmt.blocksize, 2)  # two codes to a byte
    # A transposed tensor is read in whole output rows, which must make whole blocks too.
    return math.lcm(block, max(row, 1)) if tensor.transposed else block
