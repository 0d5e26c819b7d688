"""Launches linear_some.cu and linear_groups.cu: products of up to 64 tokens with a linear layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from cupy_kernels.launch import Launch, ceil_div, cuda_dtype
from cupy_kernels.linear_few import (
    BITS,
    RESERVED_SHARED_BYTES,
    LinearKind,
    LinearWeight,
    SharedMemory,
    Tokens,
    arguments_type,
    fill_weight,
    fits,
    shared_memory,
)
from cupy_kernels.loader import (
    compiles_for,
    load_kernel,
    load_kernel_of_one_architecture,
)
from cupy_kernels.token_map import TokenMap, fill_map, fill_map_of_chunks

if TYPE_CHECKING:
    import cupy

TOKEN_CLASSES: Final = (8, 16, 32, 64)  # that kernels are made for
MAX_TOKENS: Final = TOKEN_CLASSES[-1]

# As in the .cu
_FRAGMENT_ROWS: Final = 16
_BLOCK: Final = 64
_LINE_BYTES: Final = 128
_TABLE_LINES: Final = 256
_MAP_LINES: Final = 8
_USED_GAPS: Final = _MAP_LINES + 5  # of linear_groups.cu: map, offset and barriers
_GROUP_CHUNK: Final = 256  # columns
_SUM_BYTES: Final = 512  # of a warp's lanes, four sums each
_X_BUFFERS: Final = 3

# For warps to count arrivals in, whatever the layer: four bytes for each warp of the launch.
COUNTER_BYTES: Final = 1 << 14


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("layers", arguments_type(1)),
        ("partials", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("units", ctypes.c_int),
        ("longer", ctypes.c_int),
    )


class _GroupArguments(ctypes.Structure):
    _fields_ = (
        ("tokens", TokenMap),
        *_Arguments._fields_,
        ("padding", ctypes.c_byte * 64),  # to a multiple of 64, at least
    )


class LinearSome:
    """A launch for a given layer, to be queued again and again.

    Args:
        kind: without a norm, a residual or a gate.
        max_tokens: the most tokens that `queue` will be given, up to 64.
        overlap: begin while the launch before still runs (see `Launch`).
        plan: another one than `specialise` makes.

    Attributes:
        sum_bytes: what `queue` wants for sums.

    Raises:
        ValueError: more tokens than the kernel takes, or a kind that does not fit.
    """

    def __init__(
        self,
        kind: LinearKind,
        weight: LinearWeight,
        *,
        max_tokens: int,
        overlap: bool = True,
        plan: Plan | None = None,
    ) -> None:
        plan = plan or _plan(kind, weight.rows, max_tokens)
        arguments = _GroupArguments() if plan.tuning.x_stages else _Arguments()
        fill_weight(arguments.layers.weights[0], weight)
        arguments.layers.blocksize_log2 = kind.blocksize.bit_length() - 1
        arguments.units, arguments.longer = divmod(plan.num_units, plan.num_blocks)
        self._launch = Launch(
            plan.load(),
            (plan.num_blocks,),
            plan.threads,
            plan.shared_bytes,
            arguments,
            overlap=overlap,
        )
        self._max_tokens = max_tokens
        self._columns = kind.columns
        self._box = (plan.tuning.column_warps, plan.tokens) if plan.tuning.x_stages else None
        self._told: Tokens | None = None
        self.sum_bytes = plan.sum_bytes

    def set_weight(self, weight: LinearWeight) -> None:
        """Take another layer of the same shape."""
        fill_weight(self._launch.arguments.layers.weights[0], weight)

    def queue(self, tokens: Tokens, stream: int, *, counters: int, sums: int) -> None:
        """Queue the products of `tokens` on `stream`; told the same object, faster.

        Launches share both buffers as long as none runs beside another.

        Args:
            counters: address of COUNTER_BYTES bytes, zero before the first launch and after each.
            sums: address of `sum_bytes` bytes, 16-byte aligned, of whatever contents.

        Raises:
            ValueError: more tokens than the launch was made for.
        """
        if tokens is not self._told:
            self._tell(tokens)
        arguments = self._launch.arguments
        arguments.arrived, arguments.partials = counters, sums
        self._launch(stream)

    def _tell(self, tokens: Tokens) -> None:
        if not 0 < tokens.count <= self._max_tokens:
            raise ValueError(f"{tokens.count} tokens, the launch takes {self._max_tokens}")
        layers = self._launch.arguments.layers
        layers.weights[0].out = tokens.outs[0]
        layers.weights[0].out_stride = tokens.out_strides[0]
        layers.x, layers.x_stride = tokens.x, tokens.x_stride
        layers.num_tokens = tokens.count
        if self._box is not None:
            self._map(tokens, self._box)
        self._told = tokens

    def _map(self, tokens: Tokens, box: tuple[int, int]) -> None:
        target = self._launch.arguments.tokens
        place = tokens.x, tokens.x_stride, tokens.count
        if self._columns % _GROUP_CHUNK:
            fill_map(target, *place, columns=self._columns, box=box[1])
        else:
            fill_map_of_chunks(target, *place, self._columns, chunk=_GROUP_CHUNK, box=box)


def compile_for(kind: LinearKind, rows: int, max_tokens: int) -> None:
    """Have the kernel in the cache and loaded."""
    _plan(kind, rows, max_tokens).load()


def fills_in_clusters(kind: LinearKind, rows: int, max_tokens: int) -> bool:
    """Whether clusters share a product, and keep most of the current GPU busy.

    Args:
        rows: of the layer.
        max_tokens: up to 64.

    Raises:
        ValueError: more, or a kind that does not fit.
    """
    plan = _plan(kind, rows, max_tokens)
    return plan.tuning.split > 1 and plan.num_blocks >= _FULL_SHARE * _multiprocessors()


# -- how a kernel is specialised ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuning:
    """Shape of a thread block.

    Attributes:
        row_warps: warps with rows of their own.
        column_warps: warps that share rows and take turns in their chunks.
        fragments: of 16 rows that a warp has.
        stages: of a warp's ring.
        step_values: activations between two meetings of the warps, tokens times columns.
        unroll: blocks of 64 columns that the compiler interleaves.
        x_stages: of the ring of activations of linear_groups.cu, where four warps multiply
            together; a multiple of four, as are warps with rows of their own. 0: linear_some.cu.
        split: thread blocks of a cluster that share a tile of linear_groups.cu; with 1 all thread
            blocks of a launch share all tiles.
    """

    row_warps: int
    column_warps: int
    fragments: int
    stages: int
    step_values: int = 4096
    unroll: int = 1
    x_stages: int = 0
    split: int = 1

    @property
    def warps(self) -> int:
        """Of a thread block."""
        return self.row_warps * self.column_warps

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.row_warps * self.fragments * _FRAGMENT_ROWS


# What was fastest on an H200, the best for large layers first (docs/kernels.md). With 32 tokens a
# longer step is worth more than a third stage.
TUNINGS: Final[dict[int, tuple[Tuning, ...]]] = {
    8: (
        Tuning(7, 2, 2, 2, step_values=2048),
        Tuning(8, 1, 2, 3, step_values=2048, unroll=4),
    ),
    16: (Tuning(8, 1, 2, 3, unroll=2),),
    32: (Tuning(8, 1, 2, 2, step_values=8192, unroll=2), Tuning(8, 1, 2, 2)),
    64: (Tuning(8, 1, 2, 3),),
}

# Of GPUs with 99 KiB of shared memory.
SMALL_TUNINGS: Final = (Tuning(4, 1, 2, 2), Tuning(4, 1, 1, 2))


def _of_sixteen_warps(x_stages: int) -> tuple[Tuning, ...]:
    """All 64 rows high but for the last, of 128; `x_stages` of four column warps."""
    narrow = (Tuning(4, 4, 1, 3, x_stages=x_stages, split=split) for split in (1, 2, 4))
    return *narrow, Tuning(8, 2, 1, 3, x_stages=2 * x_stages, split=2)


# Where warps multiply in groups (Hopper), instead of the others.
GROUP_TUNINGS: Final[dict[int, tuple[Tuning, ...]]] = {
    8: _of_sixteen_warps(8),
    16: _of_sixteen_warps(8),
    32: _of_sixteen_warps(4),
    64: (
        Tuning(4, 2, 1, 3, x_stages=4),
        Tuning(4, 2, 1, 3, x_stages=4, split=2),
        Tuning(4, 2, 1, 3, x_stages=4, split=4),
        Tuning(4, 2, 2, 2, x_stages=4, split=2),
        Tuning(12, 1, 1, 2, x_stages=8, split=4),
    ),
}
# What else takes time on an H200, in weights that are looked up meanwhile: a column of a tile, of
# whose tokens copies are made, this number and one more for so many tokens; an exchange of sums
# through memory (docs/kernels.md).
_COLUMN_VALUES: Final = 8
_TOKENS_PER_VALUE: Final = 8
_EXCHANGE_VALUES: Final = 75_000

# Of the multiprocessors, that clusters make good use of.
_FULL_SHARE: Final = 0.9

# Another tuning than the first is taken where the busiest thread block has so much less to do.
_TOLERANCE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """A specialisation of the kernel, with its launch's shape.

    Attributes:
        num_units: units of work of the launch, which its thread blocks share.
        sum_bytes: of each thread block's sums of its first tile and of its last; none in clusters.
        block_columns: of tiles, of the busiest thread block.
        shared_sums: of other thread blocks that the last one of a tile, or of two, may have to add;
            in clusters, that each is given.
    """

    defines: tuple[tuple[str, str | int], ...]
    tuning: Tuning
    tokens: int
    shared_bytes: int
    num_units: int
    num_blocks: int
    sum_bytes: int
    block_columns: int
    shared_sums: int

    @property
    def block_values(self) -> int:
        """Weights of the busiest thread block."""
        return self.block_columns * self.tuning.rows

    @property
    def cost(self) -> float:
        """Of the busiest thread block, in weights: a sum takes about as long (docs/kernels.md)."""
        through_memory = self.tuning.split == 1 and self.shared_sums > 0
        exchange = _EXCHANGE_VALUES if through_memory else 0
        copies = self.block_columns * (_COLUMN_VALUES + self.tokens / _TOKENS_PER_VALUE)
        return self.block_values + copies + self.shared_sums + exchange

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return (self.tuning.warps + (4 if self.tuning.x_stages else 0)) * 32

    @property
    def kernel(self) -> str:
        """The name of its .cu file."""
        return "linear_groups" if self.tuning.x_stages else "linear_some"

    def load(self) -> cupy.RawKernel:
        """The kernel, compiled and loaded."""
        if self.tuning.x_stages:
            return load_kernel_of_one_architecture(self.kernel, **dict(self.defines))
        return load_kernel(self.kernel, cooperative=False, **dict(self.defines))


def specialise(
    kind: LinearKind,
    rows: int,
    tokens: int,
    gpu: SharedMemory,
    *,
    has_warpgroups: bool = False,
    runs_at_once: Callable[[Plan], bool] = lambda plan: True,
) -> Plan:
    """How a product is computed on a GPU.

    Args:
        tokens: one of TOKEN_CLASSES.
        has_warpgroups: kernels are compiled for Hopper.
        runs_at_once: whether the GPU has room for all clusters of a plan that has any.

    Raises:
        ValueError: the GPU has too little shared memory.
    """
    groups = GROUP_TUNINGS[tokens] if has_warpgroups and multiplies_in_groups(kind) else ()
    for tunings in (groups, TUNINGS[tokens], SMALL_TUNINGS):
        found = (plan_with(tuning, kind, rows, tokens, gpu) for tuning in tunings)
        plans = [plan for plan in found if plan is not None]
        if plans and tunings is groups:
            at_once = (plan for plan in plans if plan.num_blocks <= gpu.multiprocessors)
            in_order = sorted(at_once, key=lambda plan: plan.cost)
            return next(plan for plan in in_order if plan.tuning.split == 1 or runs_at_once(plan))
        best = _best(plans)
        if best is not None:
            return best
    raise ValueError(
        f"{gpu.block_bytes} bytes of shared memory are too few for products of {tokens} tokens"
    )


def _best(plans: Sequence[Plan]) -> Plan | None:
    """The first, or one after it that fills the GPU much better."""
    best: Plan | None = None
    for plan in plans:
        if best is None or plan.block_values < _TOLERANCE * best.block_values:
            best = plan
    return best


def multiplies_in_groups(kind: LinearKind) -> bool:
    """Whether there is a kernel of warpgroups for it."""
    return BITS[kind.format] == 4 and kind.blocksize > 32


def plan_with(
    tuning: Tuning, kind: LinearKind, rows: int, tokens: int, gpu: SharedMemory
) -> Plan | None:
    """The plan with a given shape of thread blocks, where they have room."""
    bits = BITS[kind.format]
    chunk = _LINE_BYTES * 8 // bits
    step_columns = min(max(tuning.step_values // tokens, _BLOCK), chunk)
    if tuning.x_stages:
        shared_bytes = _shared_bytes_of_groups(tuning, tokens)
    else:
        shared_bytes = _shared_bytes(tuning, kind, tokens, step_columns)
    if shared_bytes > min(gpu.block_bytes, gpu.multiprocessor_bytes - RESERVED_SHARED_BYTES):
        return None
    chunks = ceil_div(kind.columns, chunk)
    tile_units = ceil_div(chunks, tuning.column_warps)
    tiles = ceil_div(rows, tuning.rows)
    num_units = tiles * tile_units
    if tuning.split > 1:
        if tile_units < tuning.split:
            return None
        block_units = ceil_div(tile_units, tuning.split)
        num_blocks = tiles * tuning.split
        shared_sums = tuning.rows * tokens // tuning.split * (tuning.split - 1)
    else:
        block_units = ceil_div(num_units, gpu.multiprocessors)
        num_blocks = ceil_div(num_units, block_units)
        shared_sums = _partial_tiles(tiles, tile_units, block_units) * tuning.rows * tokens
    defines: dict[str, str | int] = {
        "ACTIVATION": cuda_dtype(kind.dtype),
        "FORMAT": kind.format.upper(),
        "NESTED": int(kind.nested),
        "UNIT": 32 if kind.blocksize == 32 and bits == 4 else _BLOCK,
        "LINE": _LINE_BYTES,
        "TOKENS": tokens,
        "COLUMNS": kind.columns,
        "EPILOGUE": 0,
        "NUM_WEIGHTS": 1,
        "ROW_WARPS": tuning.row_warps,
        "COLUMN_WARPS": tuning.column_warps,
        "STAGES": tuning.stages,
        "FRAGMENTS": tuning.fragments,
    }
    if tuning.x_stages:
        defines["WARPGROUPS"] = 1
        defines["X_STAGES"] = tuning.x_stages
        defines["SPLIT"] = tuning.split
    else:
        defines["X_COLUMNS"] = step_columns
        defines["UNROLL"] = min(tuning.unroll, step_columns // _BLOCK)
    return Plan(
        defines=tuple(defines.items()),
        tuning=tuning,
        tokens=tokens,
        shared_bytes=shared_bytes,
        num_units=num_units,
        num_blocks=num_blocks,
        sum_bytes=num_blocks * 2 * tuning.rows * tokens * 4 if tuning.split == 1 else 0,
        block_columns=block_units * tuning.column_warps * chunk,
        shared_sums=shared_sums,
    )


def _partial_tiles(tiles: int, tile_units: int, block_units: int) -> int:
    """How many parts of tiles the last thread block adds: of one tile, or of the two it cuts."""
    if tile_units % block_units == 0:
        blocks = tile_units // block_units
        return blocks if blocks > 1 else 0
    if tiles * tile_units % block_units == 0 and block_units % tile_units == 0:
        return 0
    return 2 * (ceil_div(tile_units, block_units) + 1)


def _shared_bytes(tuning: Tuning, kind: LinearKind, tokens: int, step_columns: int) -> int:
    """Table; activations, dynamic map and barrier; rings; sums of column warps."""
    is_4bit = BITS[kind.format] == 4
    table_bytes = _TABLE_LINES * 2 * _LINE_BYTES if is_4bit else 0
    lines = _X_BUFFERS * tuning.column_warps * step_columns // _BLOCK * tokens
    lines += (_MAP_LINES if kind.nested else 0) + 1
    in_gaps = is_4bit and lines <= _TABLE_LINES
    ring_bytes = tuning.column_warps * tuning.rows * _LINE_BYTES * tuning.stages
    sum_bytes = (tuning.column_warps - 1) * tuning.rows * tokens * 4
    return table_bytes + (0 if in_gaps else lines * _LINE_BYTES) + ring_bytes + sum_bytes


def _shared_bytes_of_groups(tuning: Tuning, tokens: int) -> int:
    """Table; activations; rings; sums of others, where gaps in the table do not hold them."""
    table_bytes = _TABLE_LINES * 2 * _LINE_BYTES
    gap_bytes = (_TABLE_LINES - _USED_GAPS) * _LINE_BYTES
    x_bytes = tuning.x_stages * tuning.column_warps * tokens * _LINE_BYTES
    ring_bytes = tuning.column_warps * tuning.rows * _LINE_BYTES * tuning.stages
    sums = tuning.fragments * tokens // 8  # of a lane, four at a time
    if tuning.split > 1:
        keepers = min(tuning.column_warps, sums)
        given = (tuning.split - 1) * keepers * max(sums // keepers // tuning.split, 1)
    else:
        given = (tuning.column_warps - 1) * sums
    sum_bytes = given * tuning.row_warps * _SUM_BYTES
    return table_bytes + x_bytes + ring_bytes + (sum_bytes if sum_bytes > gap_bytes else 0)


def _plan(kind: LinearKind, rows: int, max_tokens: int) -> Plan:
    import cupy

    _check(kind, max_tokens)
    tokens = next(size for size in TOKEN_CLASSES if size >= max_tokens)
    return _plan_on(kind, rows, tokens, cupy.cuda.Device().id)


def _multiprocessors() -> int:
    import cupy

    return shared_memory(cupy.cuda.Device().id).multiprocessors


@cache
def _plan_on(kind: LinearKind, rows: int, tokens: int, device: int) -> Plan:
    return specialise(
        kind,
        rows,
        tokens,
        shared_memory(device),
        has_warpgroups=compiles_for("sm_90"),
        runs_at_once=_runs_at_once,
    )


def _runs_at_once(plan: Plan) -> bool:
    """Whether the current device has room for all clusters, each in a group of multiprocessors.

    An H200 has it for 66 of two thread blocks, and for 30 of four.
    """
    split = plan.tuning.split
    arguments = _GroupArguments()
    launch = Launch(
        plan.load(), (split,), plan.threads, plan.shared_bytes, arguments, overlap=False
    )
    return launch.count_clusters(split) * split >= plan.num_blocks


def _check(kind: LinearKind, max_tokens: int) -> None:
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"{max_tokens} tokens, the kernel takes 1 to {MAX_TOKENS}")
    if not fits(kind):
        raise ValueError(f"{kind.columns} columns are no multiple of {_BLOCK}")
    if kind.norm != "none" or kind.epilogue != "bias":
        raise ValueError("the kernel takes a layer alone: no norm, no residual, no gate")
