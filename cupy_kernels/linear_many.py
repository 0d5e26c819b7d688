"""Launches linear_many.cu: products of many tokens with packed linear layers, on Hopper.

Clocks were measured with NF4 in blocks of 64 and double quantization.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cupy_kernels.launch import Launch, ceil_div, cuda_dtype, current_gpu
from cupy_kernels.linear_few import (
    MAX_WEIGHTS,
    LinearKind,
    LinearWeight,
    Tokens,
    arguments_type,
    fill_weight,
)
from cupy_kernels.loader import compiles_for, load_kernel_of_one_architecture
from cupy_kernels.token_map import TokenMap, fill_map, fill_packed_map

if TYPE_CHECKING:
    import cupy

# As in the .cu
_TILE_ROWS: Final = 128
_BLOCK: Final = 64
CHUNK: Final = 256  # columns of a row, a multiple of it
_THREADS: Final = 384
_CHUNK_STAGES: Final = CHUNK // _BLOCK
_TABLE_BYTES: Final = 1 << 16
_SCALES_BYTES: Final = 2 * _TILE_ROWS * _CHUNK_STAGES * 4  # of two chunks
_BARRIER_BYTES: Final = 8
_BITS: Final = {"nf4": 4, "fp4": 4, "int8": 8}
_NO_TILE: Final = (1 << 31) - 1


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("tokens", TokenMap),
        ("packed", TokenMap * MAX_WEIGHTS),
        ("outs", TokenMap * MAX_WEIGHTS),
        ("layers", arguments_type(MAX_WEIGHTS)),
        ("token_tiles", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("has_outs", ctypes.c_int),
        ("padding", ctypes.c_byte * 64),  # to a multiple of 64, at least
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """Of tiles.

    Attributes:
        tokens: of a tile of 128 rows.
        split: thread blocks that share a tile's columns.
        block_clocks: for 64 columns of a tile.
        tile_clocks: for what a tile takes besides.
    """

    tokens: int
    split: int
    block_clocks: int
    tile_clocks: int

    def shared_bytes(self, bits: int) -> int:
        """Table, ring, scales, results and barriers, for weights of so many bits."""
        stage = _BLOCK * (self.tokens * 16 + _TILE_ROWS * bits) // 8
        stages = _CHUNK_STAGES * (1 if self.tokens > 128 or bits == 4 else 2)
        barriers = 2 * stages + 8
        table_and_scales = _TABLE_BYTES + _SCALES_BYTES if bits == 4 else 0
        results = _TILE_ROWS * self.tokens * 2 if self.hands_over and bits == 8 else 0
        return table_and_scales + stages * stage + results + barriers * _BARRIER_BYTES

    @property
    def hands_over(self) -> bool:
        """Whether the copy engine stores results, where it can: all but those of last tiles."""
        return self.tokens == 256 and self.split == 1


# Clocks as measured on an H200 (docs/kernels.md).
SHAPES: Final = (
    Shape(128, 1, 720, 3000),
    Shape(128, 2, 800, 4400),
    Shape(192, 1, 930, 1400),
    Shape(192, 2, 960, 5800),
    Shape(256, 1, 1110, 3400),
    Shape(256, 2, 1145, 6400),
)

# INT8 codes are not looked up.
_RELATIVE_CLOCKS: Final = {"int8": 0.95}

# The other way, on the same card and by each multiprocessor: weights that are dequantized, weights
# that PyTorch's product reads, and products that it makes; what two launches take besides.
_DEQUANTIZED_PER_CLOCK: Final = 6.0
_READ_PER_CLOCK: Final = 8.9
_PRODUCTS_PER_CLOCK: Final = 1990.0
_LAUNCH_CLOCKS: Final = 5000


def fits(kind: LinearKind) -> bool:
    """Whether the kernel takes such layers, on the current device."""
    return (
        kind.format in _BITS
        and (kind.format == "int8" or kind.blocksize >= _BLOCK)
        and kind.columns % CHUNK == 0
        and kind.norm == "none"
        and kind.epilogue == "bias"
        and not kind.adapted
        and compiles_for("sm_90")
    )


def is_faster(kind: LinearKind, rows: Sequence[int], tokens: int) -> bool:
    """Whether it should be faster than to dequantize the layers, of so many rows, and multiply."""
    columns = kind.columns
    multiprocessors = current_gpu().multiprocessors
    shape = shape_on(tuple(rows), columns, tokens)
    clocks = estimate_clocks(shape, rows, columns, tokens, multiprocessors)
    clocks *= _RELATIVE_CLOCKS.get(kind.format, 1.0)
    weights = sum(rows) * columns / multiprocessors
    product = weights * max(tokens / _PRODUCTS_PER_CLOCK, 1 / _READ_PER_CLOCK)
    return clocks < weights / _DEQUANTIZED_PER_CLOCK + product + _LAUNCH_CLOCKS


def shape_on(rows: tuple[int, ...], columns: int, tokens: int) -> Shape:
    """`choose_shape` for the current device."""
    return choose_shape(rows, columns, tokens, current_gpu().multiprocessors)


@lru_cache(maxsize=4096)  # of as many lengths of prompts
def choose_shape(rows: tuple[int, ...], columns: int, tokens: int, multiprocessors: int) -> Shape:
    """The one that should take least time."""
    return min(
        SHAPES, key=lambda shape: estimate_clocks(shape, rows, columns, tokens, multiprocessors)
    )


def estimate_clocks(
    shape: Shape, rows: Sequence[int], columns: int, tokens: int, multiprocessors: int
) -> float:
    """Of the busiest thread block, as a model has it that was fitted to measurements.

    Args:
        rows: of each layer.
        tokens: of the launch, not of a tile.
    """
    tiles = _row_tiles(rows) * ceil_div(tokens, shape.tokens)
    clusters = multiprocessors // shape.split
    chunks = ceil_div(columns // CHUNK, shape.split)
    tile_clocks = chunks * (CHUNK // _BLOCK) * shape.block_clocks + shape.tile_clocks
    return ceil_div(tiles, clusters) * tile_clocks


def _row_tiles(rows: Sequence[int]) -> int:
    return sum(ceil_div(count, _TILE_ROWS) for count in rows)


class LinearMany:
    """A launch for given layers, to be queued again and again.

    Args:
        kind: of all layers; one that `fits`.
        weights: one to three.
        num_tokens: that the shape of tiles is chosen for.
        overlap: begin while the launch before still runs (see `Launch`).
        shape: another one than `choose_shape` makes.

    Attributes:
        shape: of its tiles.

    Raises:
        ValueError: no layer, or more than three.
        RuntimeError: the driver refuses.
    """

    def __init__(
        self,
        kind: LinearKind,
        weights: Sequence[LinearWeight],
        num_tokens: int,
        *,
        overlap: bool = True,
        shape: Shape | None = None,
    ) -> None:
        if not 1 <= len(weights) <= MAX_WEIGHTS:
            raise ValueError(f"{len(weights)} layers, a launch takes 1 to {MAX_WEIGHTS}")
        rows = tuple(weight.rows for weight in weights)
        self.shape = shape or shape_on(rows, kind.columns, num_tokens)
        self._columns, self._bits = kind.columns, _BITS[kind.format]
        self._rows, self._row_tiles = rows, _row_tiles(rows)
        arguments = _Arguments()
        arguments.layers.blocksize_log2 = kind.blocksize.bit_length() - 1
        arguments.chunks = kind.columns // CHUNK
        self._launch = Launch(
            _load(kind, self.shape),
            (self.shape.split,),
            _THREADS,
            self.shape.shared_bytes(self._bits),
            arguments,
            overlap=overlap,
        )
        self._clusters = self._launch.count_clusters(self.shape.split)
        self._mapped: tuple[int, int, int] | None = None
        self._told: Tokens | None = None
        self.set_weights(weights)

    def set_weights(self, weights: Sequence[LinearWeight]) -> None:
        """Take other layers of the same shapes; ValueError for others."""
        rows = tuple(weight.rows for weight in weights)
        if rows != self._rows:
            raise ValueError(f"layers of {rows} rows, the launch is for {self._rows}")
        arguments = self._launch.arguments
        first_tile = 0
        for place in arguments.layers.weights:
            place.first_tile = _NO_TILE
        places = zip(arguments.layers.weights, arguments.packed, weights, strict=False)
        for place, packed, weight in places:
            fill_weight(place, weight)
            place.first_tile = first_tile
            first_tile += ceil_div(weight.rows, _TILE_ROWS)
            fill_packed_map(
                packed,
                weight.weight,
                self._columns,
                weight.rows,
                bits=self._bits,
                box=_TILE_ROWS,
            )

    def queue(self, tokens: Tokens, stream: int) -> None:
        """Queue the products of one or more `tokens` on `stream`; told the same object, faster.

        The residual, where there is one, is added to each; of one layer it may be the output.

        Raises:
            ValueError: another number of outputs than layers.
        """
        if tokens is not self._told:
            self._tell(tokens)
        self._launch(stream)

    def _tell(self, tokens: Tokens) -> None:
        if len(tokens.outs) != len(self._rows):
            raise ValueError(f"{len(tokens.outs)} outputs of {len(self._rows)} layers")
        arguments = self._launch.arguments
        layers = arguments.layers
        for place, out, stride in zip(
            layers.weights, tokens.outs, tokens.out_strides, strict=False
        ):
            place.out, place.out_stride = out, stride
        layers.residual, layers.residual_stride = tokens.residual, tokens.residual_stride
        layers.num_tokens = tokens.count
        self._map(tokens)
        self._map_outs(tokens)
        self._told = tokens

    def _map(self, tokens: Tokens) -> None:
        place = tokens.x, tokens.x_stride, tokens.count
        if place == self._mapped:
            return
        arguments, shape = self._launch.arguments, self.shape
        fill_map(arguments.tokens, *place, columns=self._columns, box=shape.tokens)
        arguments.token_tiles = ceil_div(tokens.count, shape.tokens)
        num_tiles = self._row_tiles * arguments.token_tiles
        arguments.layers.num_tiles = num_tiles
        self._launch.set_grid(min(num_tiles, self._clusters) * shape.split)
        self._mapped = place

    def _map_outs(self, tokens: Tokens) -> None:
        arguments = self._launch.arguments
        arguments.has_outs = self.shape.hands_over and can_be_handed_over(self._rows, tokens)
        if not arguments.has_outs:
            return
        for place, out, stride, rows in zip(
            arguments.outs, tokens.outs, tokens.out_strides, self._rows, strict=False
        ):
            fill_map(place, out, stride, tokens.count, columns=rows, box=self.shape.tokens)


def can_be_handed_over(rows: Sequence[int], tokens: Tokens) -> bool:
    """Whether the copy engine can store the outputs, of so many rows each.

    It wants whole parts of 16 bytes: of what lies beside them nothing would be left.
    """
    return (
        all(count % 8 == 0 for count in rows)
        and all(out % 16 == 0 for out in tokens.outs)
        and all(stride % 8 == 0 for stride in tokens.out_strides)
        and (tokens.residual % 4, tokens.residual_stride % 2) == (0, 0)
    )


def compile_for(kind: LinearKind, rows: Sequence[int], num_tokens: int) -> None:
    """Have the kernel in the cache and loaded."""
    _load(kind, shape_on(tuple(rows), kind.columns, num_tokens))


def defines_of(kind: LinearKind, shape: Shape) -> dict[str, str | int]:
    """What specialises the kernel: the same for all layers of a format and all lengths."""
    return {
        "ACTIVATION": cuda_dtype(kind.dtype),
        "FORMAT": kind.format.upper(),
        "NESTED": int(kind.nested),
        "TOKENS": shape.tokens,
        "SPLIT": shape.split,
        "NUM_WEIGHTS": MAX_WEIGHTS,
        "EPILOGUE": 0,
        "UNIT": _BLOCK,
        "LINE": CHUNK * _BITS[kind.format] // 8,
        "WARPGROUPS": 1,
    }


def _load(kind: LinearKind, shape: Shape) -> cupy.RawKernel:
    return load_kernel_of_one_architecture("linear_many", **defines_of(kind, shape))
