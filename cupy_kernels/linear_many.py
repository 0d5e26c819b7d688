"""Launches linear_many.cu: products of many tokens with packed linear layers, on Hopper.

Clocks were measured with NF4 in blocks of 64 and double quantization.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cupy_kernels.launch import Launch, ceil_div, cuda_dtype, num_multiprocessors
from cupy_kernels.linear_few import (
    BITS,
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
_VALUES_BYTES: Final = _TILE_ROWS * 16 * 2  # of 4-bit codes, of a stage
_MAPS_BYTES: Final = MAX_WEIGHTS * 256 * 4
_GROUPS: Final = 2  # of warps that multiply
_BARRIER_BYTES: Final = 8
_FORMATS: Final = ("nf4", "fp4", "int8")
_NO_TILE: Final = (1 << 31) - 1


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("tokens", TokenMap),
        ("packed", TokenMap * MAX_WEIGHTS),
        ("outs", TokenMap * MAX_WEIGHTS),
        ("layers", arguments_type(MAX_WEIGHTS)),
        ("row_tiles", ctypes.c_int),
        ("band", ctypes.c_int),
        ("band_tiles", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("has_outs", ctypes.c_int),
        ("shared_from", ctypes.c_int),
        ("padding", ctypes.c_byte * 64),  # to a multiple of 64, at least
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """Of tiles.

    Attributes:
        tokens: of a tile of 128 rows.
        split: thread blocks that share the last tiles: they have half of the columns each. 1: none.
        block_clocks: for 64 columns of a tile.
        tile_clocks: for what a tile takes besides.
        shared_tile_clocks: for what a shared tile takes besides.
    """

    tokens: int
    split: int
    block_clocks: int
    tile_clocks: int
    shared_tile_clocks: int = 0

    def shared_bytes(self, bits: int) -> int:
        """Ring, maps, results and barriers, for weights of so many bits."""
        stage = _BLOCK * (self.tokens * 16 + _TILE_ROWS * bits) // 8
        stages = _CHUNK_STAGES * (1 if self.tokens > 128 else 2)
        barriers = 2 * (stages + _GROUPS) * _BARRIER_BYTES  # full and empty; handed and fetched
        if bits == 4:
            return stages * (stage + _VALUES_BYTES) + _MAPS_BYTES + barriers
        results = _TILE_ROWS * self.tokens * 2 if self.hands_over else 0
        return stages * stage + results + barriers

    @property
    def hands_over(self) -> bool:
        """Whether the copy engine stores results, where it can: all but those of last tiles."""
        return self.tokens == 256


# Clocks as measured on an H200 (docs/kernels.md).
SHAPES: Final = (
    Shape(128, 1, 730, 2200),
    Shape(128, 2, 730, 2200, 5500),
    Shape(192, 1, 895, 1650),
    Shape(192, 2, 895, 1650, 7200),
    Shape(256, 1, 1060, 1650),
    Shape(256, 2, 1060, 1650, 7700),
)

# INT8 codes are not looked up.
_RELATIVE_CLOCKS: Final = {"int8": 0.97}

# The other way, on the same card and by each multiprocessor: weights that are dequantized, weights
# that PyTorch's product reads, and products that it makes; what two launches take besides.
_DEQUANTIZED_PER_CLOCK: Final = 6.0
_READ_PER_CLOCK: Final = 8.9
_PRODUCTS_PER_CLOCK: Final = 1990.0
_LAUNCH_CLOCKS: Final = 5000


def fits(kind: LinearKind) -> bool:
    """Whether the kernel takes such layers, on the current device."""
    return (
        kind.format in _FORMATS
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
    multiprocessors = num_multiprocessors()
    plan = choose_plan(tuple(rows), columns, tokens, multiprocessors)
    clocks = plan.clocks * _RELATIVE_CLOCKS.get(kind.format, 1.0)
    weights = sum(rows) * columns / multiprocessors
    product = weights * max(tokens / _PRODUCTS_PER_CLOCK, 1 / _READ_PER_CLOCK)
    return clocks < weights / _DEQUANTIZED_PER_CLOCK + product + _LAUNCH_CLOCKS


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    Attributes:
        shape: of all tiles.
        num_tiles: of the product.
        num_shared: tiles, the last, that are shared.
        clocks: of the busiest thread block, as a model has it that was fitted to measurements.
    """

    shape: Shape
    num_tiles: int
    num_shared: int
    clocks: int


def shape_on(rows: tuple[int, ...], columns: int, tokens: int) -> Shape:
    """`choose_plan`'s for the current device."""
    return choose_plan(rows, columns, tokens, num_multiprocessors()).shape


@lru_cache(maxsize=4096)  # of as many lengths of prompts
def choose_plan(
    rows: tuple[int, ...],
    columns: int,
    tokens: int,
    num_blocks: int,
    shapes: tuple[Shape, ...] = SHAPES,
) -> Plan:
    """The one that should take least time.

    Args:
        rows: of each layer.
        tokens: of the launch, not of a tile.
        num_blocks: thread blocks that run at once.
        shapes: to choose from.
    """
    plans = []
    for shape in shapes:
        num_tiles = _row_tiles(rows) * ceil_div(tokens, shape.tokens)
        for num_shared in _shares(shape, columns, num_tiles, num_blocks):
            clocks = _clocks(shape, columns, num_tiles - num_shared, num_shared, num_blocks)
            plans.append(Plan(shape, num_tiles, num_shared, clocks))
    return min(plans, key=lambda plan: plan.clocks)


def _shares(shape: Shape, columns: int, num_tiles: int, num_blocks: int) -> list[int]:
    """How many of the last tiles may be shared: none; those of the last round, or all."""
    if shape.split == 1 or columns < shape.split * CHUNK:
        return [0]
    return [num_tiles % num_blocks, num_tiles]


def _clocks(shape: Shape, columns: int, num_alone: int, num_shared: int, num_blocks: int) -> int:
    chunks = columns // CHUNK
    alone = chunks * _CHUNK_STAGES * shape.block_clocks + shape.tile_clocks
    shared_chunks = ceil_div(chunks, shape.split)
    shared = shared_chunks * _CHUNK_STAGES * shape.block_clocks + shape.shared_tile_clocks
    pairs = num_blocks // shape.split
    return ceil_div(num_alone, num_blocks) * alone + ceil_div(num_shared, pairs) * shared


def band_of(shape: Shape, bits: int, num_blocks: int) -> int:
    """Tiles of rows that a band is wide, so that tiles that run at once read fewest bytes.

    These are those of `band` tiles of rows and of `num_blocks` / `band` tiles of tokens. The sum is
    least where both are equal.
    """
    token_bits, row_bits = shape.tokens * 16, _TILE_ROWS * bits
    return max(math.isqrt(num_blocks * token_bits // row_bits), 1)


def _row_tiles(rows: Sequence[int]) -> int:
    return sum(ceil_div(count, _TILE_ROWS) for count in rows)


class LinearMany:
    """A launch for given layers, to be queued again and again.

    Args:
        kind: of all layers; one that `fits`.
        weights: one to three.
        num_tokens: that the shape of tiles is chosen for.
        overlap: begin while the launch before still runs (see `Launch`).
        shape: another one than is chosen.
        num_shared: how many of the last tiles are shared, instead of what is chosen.

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
        num_shared: int | None = None,
    ) -> None:
        if not 1 <= len(weights) <= MAX_WEIGHTS:
            raise ValueError(f"{len(weights)} layers, a launch takes 1 to {MAX_WEIGHTS}")
        rows = tuple(weight.rows for weight in weights)
        self.shape = shape or shape_on(rows, kind.columns, num_tokens)
        self._columns, self._bits = kind.columns, BITS[kind.format]
        self._rows = rows
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
        self._num_blocks = self._launch.count_clusters(self.shape.split) * self.shape.split
        arguments.row_tiles = _row_tiles(rows)
        arguments.band = band_of(self.shape, self._bits, self._num_blocks)
        self._num_shared = num_shared
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
        arguments.band_tiles = arguments.band * ceil_div(tokens.count, shape.tokens)
        plan = choose_plan(self._rows, self._columns, tokens.count, self._num_blocks, (shape,))
        num_shared = plan.num_shared if self._num_shared is None else self._num_shared
        num_alone = plan.num_tiles - num_shared
        arguments.layers.num_tiles, arguments.shared_from = plan.num_tiles, num_alone
        wanted = max(ceil_div(num_alone, shape.split), num_shared) * shape.split
        self._launch.set_grid(min(wanted, self._num_blocks))
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
        "LINE": CHUNK * BITS[kind.format] // 8,
        "WARPGROUPS": 1,
    }


def _load(kind: LinearKind, shape: Shape) -> cupy.RawKernel:
    return load_kernel_of_one_architecture("linear_many", **defines_of(kind, shape))
