"""Launches linear_few.cu: products of up to eight tokens with one to three linear layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from cupy_kernels.launch import Launch, ceil_div, cuda_dtype
from cupy_kernels.loader import load_kernel

if TYPE_CHECKING:
    import cupy

Format = Literal["nf4", "fp4", "int8", "plain"]
Norm = Literal["none", "rms", "rms_plus_one"]
Epilogue = Literal["bias", "residual", "gated"]
Gate = Literal["silu", "gelu_tanh", "gelu"]

MAX_TOKENS: Final = 8
MAX_WEIGHTS: Final = 3
OLDEST_COMPUTE_CAPABILITY: Final = (8, 0)  # asynchronous copies, bfloat16 in tensor cores
RANK_MULTIPLE: Final = 8  # of adapters; their matrices are filled up with zeros
NORMS: Final[dict[Norm, int]] = {"none": 0, "rms": 1, "rms_plus_one": 2}
_EPILOGUES: Final[dict[Epilogue, int]] = {"bias": 0, "residual": 1, "gated": 2}
BITS: Final[dict[Format, int]] = {"nf4": 4, "fp4": 4, "int8": 8, "plain": 16}  # of a weight

RESERVED_SHARED_BYTES: Final = 1024  # that the driver takes of each thread block's

# As in the .cu
_FRAGMENT_ROWS: Final = 16
_LINE_BYTES: Final = 128
_NUM_LINES: Final = 256
_BLOCK: Final = 64


@dataclass(frozen=True, slots=True)
class LinearKind:
    """What all layers of a launch share, and what is fused with them.

    Attributes:
        columns: in_features; a multiple of 64 (see `fits`).
        blocksize: of 4-bit weights.
        nested: absmax is quantized itself.
        dtype: of activations (BF16 or F16), and of plain weights.
        norm: taken of the activations before.
        epilogue: bias alone; bias and then the residual added; or two layers, gate and up, of which
            act(gate) * up is stored.
        adapted: adapters add to layers, before all that the epilogue does.
    """

    format: Format
    columns: int
    dtype: str
    blocksize: int = 64
    nested: bool = False
    norm: Norm = "none"
    epilogue: Epilogue = "bias"
    gate: Gate = "silu"
    adapted: bool = False


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A linear layer as addresses; 0 where there is none.

    Attributes:
        weight: 4 bit: uint8 (rows * columns / 2,); INT8: int8 (rows, columns); plain: (rows,
            columns); 16-byte aligned.
        absmax: float32 (m,) unless nested; INT8: SCB float32 (rows,).
        absmax_codes: uint8 (m,).
        nested_absmax: float32 (ceil(m/256),).
        nested_quant_map: float32 (256,).
        nested_offset: float32 ().
        bias: (rows,) of the activations' dtype.
    """

    rows: int
    weight: int
    absmax: int = 0
    absmax_codes: int = 0
    nested_absmax: int = 0
    nested_quant_map: int = 0
    nested_offset: int = 0
    bias: int = 0


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """What an adapter adds to a layer, b @ inner[first : first + rank]; rank 0 adds nothing.

    Attributes:
        b: (rows, rank) of the activations' dtype, as an address, 16-byte aligned.
        rank: a multiple of 8, as is `first`.
        first: of its inner values among a token's.
    """

    b: int = 0
    rank: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Activations and results of a launch, as addresses, rows of tokens `stride` values apart.

    Attributes:
        outs: one for each layer; of gate and up only the first counts.
        inner: float32 (count, inner_stride), the inner values of adapters; 16-byte aligned.
        x_is_there: int32, not 0 once x may be read while the launch that makes the inner values
            still runs (see `AdapterInner`); 0 to wait for its end.
    """

    count: int
    x: int
    x_stride: int
    outs: tuple[int, ...]
    out_strides: tuple[int, ...]
    residual: int = 0
    residual_stride: int = 0
    inner: int = 0
    inner_stride: int = 0
    x_is_there: int = 0


@dataclass(frozen=True, slots=True)
class NormWeight:
    """The weight of the RMS norm before, (columns,) of the activations' dtype, as an address."""

    weight: int
    epsilon: float


class _Weight(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int),
        ("first_tile", ctypes.c_int),
    )


class _Adapter(ctypes.Structure):
    _fields_ = (("b", ctypes.c_void_p), ("rank", ctypes.c_int), ("first", ctypes.c_int))


def fits(kind: LinearKind) -> bool:
    """Whether the kernel takes layers of this kind: rows of whole groups of 64."""
    return kind.columns % _BLOCK == 0


class LinearFew:
    """A launch for given layers, to be queued again and again.

    Args:
        max_tokens: the most tokens that `queue` will be given, up to 8.
        adapters: one for each layer of an adapted kind.
        overlap: begin while the launch before still runs (see `Launch`).

    Raises:
        ValueError: more layers or tokens than the kernel takes, or a kind that does not fit.
    """

    def __init__(
        self,
        kind: LinearKind,
        weights: Sequence[LinearWeight],
        *,
        max_tokens: int,
        norm: NormWeight | None = None,
        adapters: Sequence[AdapterWeight] = (),
        overlap: bool = True,
    ) -> None:
        _check(kind, weights, max_tokens, norm)
        _check_adapters(kind, weights, adapters)
        plan = _plan(kind, len(weights), _token_class(max_tokens))
        everything: Any = _adapted_type(len(weights))()
        for target, adapter in zip(everything.adapters, adapters, strict=False):
            target.b, target.rank, target.first = adapter.b or None, adapter.rank, adapter.first
        self._adapted = everything if kind.adapted else None
        self._arguments = arguments = everything.layers
        first_tile = 0
        for target, weight in zip(arguments.weights, weights, strict=True):
            fill_weight(target, weight)
            target.first_tile = first_tile
            first_tile += ceil_div(weight.rows, _FRAGMENT_ROWS)
        if kind.epilogue == "gated":  # half of a tile's rows are gate's
            first_tile = ceil_div(weights[0].rows, _FRAGMENT_ROWS // 2)
        arguments.num_tiles = first_tile
        arguments.blocksize_log2 = kind.blocksize.bit_length() - 1
        if norm is not None:
            arguments.norm_weight, arguments.epsilon = norm.weight, norm.epsilon
        self._launch = Launch(
            plan.load(),
            (min(plan.num_blocks, first_tile),),
            plan.tuning.warps * 32,
            plan.shared_bytes,
            everything if kind.adapted else arguments,
            overlap=overlap,
        )
        self._max_tokens = max_tokens

    def set_weights(self, weights: Sequence[LinearWeight]) -> None:
        """Take other layers of the same shapes."""
        for target, weight in zip(self._arguments.weights, weights, strict=True):
            fill_weight(target, weight)

    def queue(self, tokens: Tokens, stream: int) -> None:
        """Queue the products of `tokens` on `stream`.

        Raises:
            ValueError: more tokens than the launch was made for.
        """
        if not 0 < tokens.count <= self._max_tokens:
            raise ValueError(f"{tokens.count} tokens, the launch takes {self._max_tokens}")
        arguments = self._arguments
        for target, out, stride in zip(
            arguments.weights, tokens.outs, tokens.out_strides, strict=False
        ):
            target.out, target.out_stride = out, stride
        arguments.x, arguments.x_stride = tokens.x, tokens.x_stride
        arguments.residual = tokens.residual or None
        arguments.residual_stride = tokens.residual_stride
        arguments.num_tokens = tokens.count
        if self._adapted is not None:
            self._adapted.inner, self._adapted.inner_stride = tokens.inner, tokens.inner_stride
            self._adapted.x_is_there = tokens.x_is_there or None
        self._launch(stream)


def compile_for(kind: LinearKind, num_weights: int, max_tokens: int) -> None:
    """Have the kernel in the cache and loaded."""
    _plan(kind, num_weights, _token_class(max_tokens)).load()


def holds_activations(kind: LinearKind, max_tokens: int) -> bool:
    """Whether warps have the activations of all columns in registers, on the current GPU."""
    defines = dict(_plan(kind, 1, _token_class(max_tokens)).defines)
    return bool(defines["HELD_X"]) and int(defines["SLICE"]) >= kind.columns


def holds_all_columns(kind: LinearKind, max_tokens: int) -> bool:
    """Whether a thread block has the activations of all columns at once, on the current GPU."""
    slice_columns = dict(_plan(kind, 1, _token_class(max_tokens)).defines)["SLICE"]
    return int(slice_columns) >= kind.columns


# -- how a kernel is specialised ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuning:
    """Warps of a thread block, stages of a warp's ring, thread blocks per multiprocessor.

    Attributes:
        slices: whether warps may hold the activations of rows that are too long a slice at a time.
    """

    warps: int
    stages: int
    blocks: int
    slices: bool = False


# The first that the GPU's shared memory holds. Two small thread blocks beat a large one, since the
# next launch begins while the second still works (docs/kernels.md).
ONE_TOKEN: Final = (
    Tuning(8, 3, 2, slices=True),
    Tuning(8, 3, 1, slices=True),
    Tuning(8, 2, 1, slices=True),
    Tuning(4, 2, 1, slices=True),
)
MORE_TOKENS: Final = (Tuning(16, 3, 1), Tuning(8, 3, 1), Tuning(8, 2, 1), Tuning(4, 2, 1))
_MAX_PASS: Final = 32
# Tried first with several tokens, where warps have the same chunks of every tile.
HELD_TOKENS: Final = {
    2: (Tuning(8, 3, 2),),
    4: (Tuning(8, 3, 2), Tuning(14, 3, 1, slices=True)),
    8: (Tuning(16, 2, 1), Tuning(14, 3, 1, slices=True)),
}
# Of a thread's 128, for the activations of a slice; a block of 64 columns takes eight.
_HELD_REGISTERS: Final = {1: 32, 2: 64, 4: 64, 8: 32}
_BLOCK_REGISTERS: Final = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A specialisation of the kernel, with its launch's shape."""

    defines: tuple[tuple[str, str | int], ...]
    tuning: Tuning
    shared_bytes: int
    num_blocks: int

    def load(self) -> cupy.RawKernel:
        """The kernel, compiled and loaded."""
        return load_kernel("linear_few", cooperative=False, **dict(self.defines))


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What a GPU has of it, and how many multiprocessors."""

    block_bytes: int
    multiprocessor_bytes: int
    multiprocessors: int


def specialise(
    kind: LinearKind, num_weights: int, tokens: int, gpu: SharedMemory
) -> tuple[dict[str, str | int], Tuning, int]:
    """The macros, the tuning and the bytes of dynamic shared memory.

    Args:
        tokens: 1, 2, 4 or 8.

    Raises:
        ValueError: the GPU has too little shared memory.
    """
    held = HELD_TOKENS.get(tokens, ())
    for i, tuning in enumerate((*held, *(ONE_TOKEN if tokens == 1 else MORE_TOKENS))):
        fit = _fit(kind, num_weights, tokens, tuning, gpu)
        if fit is not None and (fit.held or i >= len(held)):
            return _defines(kind, num_weights, tokens, tuning, fit), tuning, fit.shared_bytes
    with_norm = "" if kind.norm == "none" else " and a norm"
    raise ValueError(
        f"{gpu.block_bytes} bytes of shared memory are too few for products of {tokens} tokens "
        f"with {kind.columns} columns{with_norm}"
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """How a tuning goes.

    Attributes:
        pass_tiles: tiles of a pass.
        slice_columns: columns whose activations are held at a time.
        held: in registers.
        shared_bytes: of a thread block.
    """

    pass_tiles: int
    slice_columns: int
    held: bool
    shared_bytes: int


def _fit(
    kind: LinearKind, num_weights: int, tokens: int, tuning: Tuning, gpu: SharedMemory
) -> _Fit | None:
    """How `tuning` goes, if it does."""
    chunk = _LINE_BYTES * 8 // BITS[kind.format]
    columns = ceil_div(kind.columns, chunk) * chunk
    line_stride = 2 * _LINE_BYTES if BITS[kind.format] == 4 else _LINE_BYTES
    ring_bytes = tuning.warps * tuning.stages * _FRAGMENT_ROWS * _LINE_BYTES
    scratch_bytes = tuning.warps * tokens * 4
    fixed_bytes = _NUM_LINES * line_stride + ring_bytes + scratch_bytes
    limit = min(gpu.block_bytes, gpu.multiprocessor_bytes // tuning.blocks - RESERVED_SHARED_BYTES)
    lines = _NUM_LINES - (8 * num_weights if kind.nested else 0)
    tile_lines = max(tuning.warps * _FRAGMENT_ROWS * tokens // 32, 1)
    held_columns = _held_columns(kind, tokens, tuning)
    if held_columns and kind.norm == "none":  # they come from memory, which leaves room for sums
        if fixed_bytes > limit:
            return None
        tile_bytes = tuning.warps * _FRAGMENT_ROWS * tokens * 4
        line_tiles = min(lines // tile_lines, _MAX_PASS)
        # Several slices mean few rows, and one token small sums.
        has_more = tokens > 1 and held_columns == columns
        more_tiles = (limit - fixed_bytes) // tile_bytes if has_more else 0
        pass_tiles = min(line_tiles + more_tiles, _MAX_PASS)
        if pass_tiles < 1:
            return None
        shared_bytes = fixed_bytes + (pass_tiles - line_tiles) * tile_bytes
        return _Fit(pass_tiles, held_columns, held=True, shared_bytes=shared_bytes)
    if tokens == 1:
        room = (lines - tile_lines) * _BLOCK
    else:
        room = (limit - fixed_bytes) // (tokens * 2)
    slice_columns = columns if columns <= room else room // chunk * chunk
    least_slice = min(columns, tuning.warps * chunk)
    if slice_columns < least_slice or (kind.norm != "none" and slice_columns < columns):
        return None
    lines -= slice_columns // _BLOCK if tokens == 1 else 0
    pass_tiles = min(lines // tile_lines, _MAX_PASS)
    shared_bytes = fixed_bytes + (slice_columns * tokens * 2 if tokens > 1 else 0)
    if pass_tiles < 1 or shared_bytes > limit:
        return None
    return _Fit(pass_tiles, slice_columns, held_columns == columns, shared_bytes)


def _held_columns(kind: LinearKind, tokens: int, tuning: Tuning) -> int:
    """The columns whose activations a thread block's warps have in registers at a time, a slice.

    0 if a warp's chunks are not the same in every tile, or its registers too few.
    """
    chunk = _LINE_BYTES * 8 // BITS[kind.format]
    warp_chunks, others = divmod(ceil_div(kind.columns, chunk), tuning.warps)
    if others:
        return 0
    if tokens == 1 and BITS[kind.format] != 4:
        return 0  # bytes are the limit
    # of a single token a lane has one block of two chunks
    chunk_registers = _BLOCK_REGISTERS // 2 if tokens == 1 else chunk // _BLOCK * _BLOCK_REGISTERS
    most = _HELD_REGISTERS[tokens] // chunk_registers
    slice_chunks = max((n for n in range(1, most + 1) if warp_chunks % n == 0), default=0)
    if slice_chunks < warp_chunks and (not tuning.slices or kind.norm != "none"):
        return 0
    return slice_chunks * tuning.warps * chunk


def _defines(
    kind: LinearKind, num_weights: int, tokens: int, tuning: Tuning, fit: _Fit
) -> dict[str, str | int]:
    gate: dict[str, str | int] = {"GATE": kind.gate.upper()} if kind.epilogue == "gated" else {}
    return gate | {
        "ACTIVATION": cuda_dtype(kind.dtype),
        "FORMAT": kind.format.upper(),
        "NESTED": int(kind.nested),
        "UNIT": 32 if kind.blocksize == 32 and BITS[kind.format] == 4 else _BLOCK,
        "TOKENS": tokens,
        "NORM": NORMS[kind.norm],
        "EPILOGUE": _EPILOGUES[kind.epilogue],
        "COLUMNS": kind.columns,
        "NUM_WEIGHTS": num_weights,
        "WARPS": tuning.warps,
        "STAGES": tuning.stages,
        "FRAGMENTS": 1,
        "SLICE": fit.slice_columns,
        "PASS": fit.pass_tiles,
        "MIN_BLOCKS": tuning.blocks,
        "HELD_X": int(fit.held),
        "ADAPTED": int(kind.adapted),
    }


def _plan(kind: LinearKind, num_weights: int, tokens: int) -> Plan:
    import cupy

    return _plan_on(kind, num_weights, tokens, cupy.cuda.Device().id)


@cache
def _plan_on(kind: LinearKind, num_weights: int, tokens: int, device: int) -> Plan:
    gpu = shared_memory(device)
    defines, tuning, shared_bytes = specialise(kind, num_weights, tokens, gpu)
    return Plan(
        defines=tuple(defines.items()),
        tuning=tuning,
        shared_bytes=shared_bytes,
        num_blocks=gpu.multiprocessors * tuning.blocks,
    )


def shared_memory(device_id: int) -> SharedMemory:
    """Of a GPU by its number."""
    import cupy

    device = cupy.cuda.Device(device_id)
    return SharedMemory(
        block_bytes=device.attributes["MaxSharedMemoryPerBlockOptin"],
        multiprocessor_bytes=device.attributes["MaxSharedMemoryPerMultiprocessor"],
        multiprocessors=device.attributes["MultiProcessorCount"],
    )


@cache
def arguments_type(num_weights: int) -> type[ctypes.Structure]:
    """`Arguments` of linear_layers.cuh, of so many layers."""

    class Arguments(ctypes.Structure):
        _fields_ = (
            ("weights", _Weight * num_weights),
            ("x", ctypes.c_void_p),
            ("x_stride", ctypes.c_int64),
            ("norm_weight", ctypes.c_void_p),
            ("residual", ctypes.c_void_p),
            ("residual_stride", ctypes.c_int64),
            ("num_tiles", ctypes.c_int),
            ("num_tokens", ctypes.c_int),
            ("blocksize_log2", ctypes.c_int),
            ("epsilon", ctypes.c_float),
        )

    return Arguments


@cache
def _adapted_type(num_weights: int) -> type[ctypes.Structure]:
    """`AdaptedArguments` of adapter_layers.cuh."""

    class AdaptedArguments(ctypes.Structure):
        _fields_ = (
            ("layers", arguments_type(num_weights)),
            ("adapters", _Adapter * num_weights),
            ("inner", ctypes.c_void_p),
            ("inner_stride", ctypes.c_int64),
            ("x_is_there", ctypes.c_void_p),
        )

    return AdaptedArguments


def fill_weight(target: Any, weight: LinearWeight) -> None:
    """Set one of `weights` of an `arguments_type`, all but its results."""
    target.packed, target.rows = weight.weight, weight.rows
    target.absmax = weight.absmax or None
    target.absmax_codes = weight.absmax_codes or None
    target.nested_absmax = weight.nested_absmax or None
    target.nested_code = weight.nested_quant_map or None
    target.nested_offset = weight.nested_offset or None
    target.bias = weight.bias or None


def _token_class(max_tokens: int) -> int:
    """The number of tokens that a kernel is made for: the next power of two."""
    return 1 << (max_tokens - 1).bit_length()


def _check(
    kind: LinearKind, weights: Sequence[LinearWeight], max_tokens: int, norm: NormWeight | None
) -> None:
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"{max_tokens} tokens, the kernel takes 1 to {MAX_TOKENS}")
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{len(weights)} layers, the kernel takes 1 to {MAX_WEIGHTS}")
    if kind.epilogue == "gated" and (len(weights) != 2 or weights[0].rows != weights[1].rows):
        raise ValueError("gate and up are two layers of the same number of rows")
    if not fits(kind):
        raise ValueError(f"{kind.columns} columns are no multiple of {_BLOCK}")
    if (norm is None) != (kind.norm == "none"):
        raise ValueError(f"the norm is {kind.norm}, its weight {norm}")


def _check_adapters(
    kind: LinearKind, weights: Sequence[LinearWeight], adapters: Sequence[AdapterWeight]
) -> None:
    if len(adapters) != (len(weights) if kind.adapted else 0):
        word = "adapted" if kind.adapted else "plain"
        raise ValueError(f"{len(adapters)} adapters for {len(weights)} {word} layers")
    for it in adapters:
        if it.rank % RANK_MULTIPLE or it.first % RANK_MULTIPLE:
            raise ValueError(f"rank {it.rank} from {it.first}, no multiples of {RANK_MULTIPLE}")
