"""A model's weights at each precision: bytes on disk, bytes on the device, the largest product.

Quantized sizes come from the format that the quantizer writes, so they are what it will write. A
full precision is a plain cast of every floating-point tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from qtool.architecture import Architecture, ModelTensor
from qtool.architecture.stored_weights import place_of as file_place
from qtool.errors import Option, QtoolError
from qtool.formats.bitsandbytes import QuantizedWeight, packed_layouts
from qtool.formats.pieces import rows_at_a_time
from qtool.formats.precisions import QuantFormat, QuantizedPrecision
from qtool.formats.tensors import DTYPE_BITS, TensorLayout
from qtool.planner.activations import NO_BUFFER, DequantBuffer
from qtool.planner.inventory import AFTER, Inventory, Place, TensorGroup, place_of, take_inventory
from qtool.planner.kv_cache import Runtime
from qtool.planner.stored_formats import StoredFormat
from qtool.planner.units import FLOAT32_BYTES

CAST_DTYPES: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FLOAT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})

FLOATS: Final = {2: "BF16", 4: "F32"}  # by their bytes
COMPUTE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

# How qtool's packed linear layers multiply more than a few tokens (tests hold these against the
# runtime): a weight becomes floating point in pieces of whole rows (`qtool.formats.pieces`). The
# backward pass of INT8 makes its pieces in chunks through float32.
CHUNK_ELEMENTS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Weights:
    """One model at one precision.

    `checkpoint_bytes` is the sum of the tensors in its files, `device_bytes` what lies on the
    device when it runs, by `place_bytes`; `split_bytes` is the part that tensor parallelism
    divides, the rest every GPU holds. Computing one token reads `read_per_token_bytes`; `buffer` is
    the most that multiplying by a packed weight takes beside, an output head packed in memory
    apart: that takes `head_buffer_bytes`, and `more_before_bytes` more until it is packed.
    Activations have `element_bytes`, products with packed weights are computed in `compute_bytes`.
    """

    checkpoint_bytes: int
    device_bytes: int
    place_bytes: Mapping[Place, int]
    split_bytes: int
    read_per_token_bytes: int
    buffer: DequantBuffer
    element_bytes: int
    compute_bytes: int
    head_buffer_bytes: int = 0
    more_before_bytes: int = 0

    @property
    def are_float32(self) -> bool:
        """Whether activations are, and attention is computed in it."""
        return self.element_bytes == FLOAT32_BYTES


class _PackedWeight(NamedTuple):
    """A packed matrix [out, in]. `decoded_bytes` per element of what dequantizing rounds to: the
    dtype it was quantized from."""

    shape: tuple[int, ...]
    decoded_bytes: int
    precision: str
    blocksize: int


@dataclass(frozen=True, slots=True)
class _Stock:
    """`count` tensors of a group at a precision, bytes of one."""

    group: TensorGroup
    count: int
    file_bytes: int
    device_bytes: int
    packed: _PackedWeight | None = None


def cast_weights(inventory: Inventory, precision: str) -> Weights:
    """The weights in fp32, bf16 or fp16."""
    dtype = CAST_DTYPES[precision]
    element_bytes = DTYPE_BITS[dtype] // 8
    stocks = []
    for group, count in inventory.items():
        is_float = group.dtype in FLOAT_DTYPES
        layout = TensorLayout("", dtype if is_float else group.dtype, group.shape)
        stocks.append(_Stock(group, count, layout.num_bytes, layout.num_bytes))
    return _add_up(stocks, element_bytes, element_bytes)


def quantized_weights(
    inventory: Inventory,
    precision: QuantizedPrecision,
    *,
    element_bytes: int,
    compute_dtype: str = "bfloat16",
    runtime: Runtime = "qtool",
) -> Weights:
    """The weights as `qtool quantize` writes them; `element_bytes` of what stays unpacked.

    transformers leaves routed experts as they are: they are one parameter, no linear layers.
    """
    fmt = QuantFormat(precision)
    stocks = []
    for group, count in inventory.items():
        if group.role == "linear" or (group.role == "experts" and runtime != "transformers"):
            stocks.append(_packed_stock(group, count, fmt))
        else:
            stocks.append(_kept_stock(group, count, element_bytes))
    # config.json tells 4-bit readers what to compute in; int8 follows the activations.
    compute_bytes = element_bytes if fmt.is_int8 else COMPUTE_BYTES[compute_dtype]
    return _add_up(stocks, element_bytes, compute_bytes, runtime)


def formatted_weights(inventory: Inventory, fmt: StoredFormat, element_bytes: int) -> Weights:
    """The weights in a format of others (FP8, MXFP4, ...), from the shapes of what it packs."""
    stocks = []
    for group, count in inventory.items():
        if group.role in ("linear", "experts"):
            num_bytes = fmt.matrix_bytes(group.shape)
            stocks.append(_Stock(group, count, num_bytes, num_bytes))
        else:
            stocks.append(_kept_stock(group, count, element_bytes))
    return _add_up(stocks, element_bytes, element_bytes)


def files_as_they_are(inventory: Inventory, element_bytes: int) -> Weights:
    """The weights of files in a format of others: every tensor as it is stored."""
    stocks = [
        _Stock(group, count, group.layout.num_bytes, group.layout.num_bytes)
        for group, count in inventory.items()
    ]
    return _add_up(stocks, element_bytes, element_bytes)


def packed_weights(
    tensors: Mapping[str, TensorLayout],
    packed: Mapping[str, QuantizedWeight],
    architecture: Architecture,
    element_bytes: int,
    compute_bytes: int,
    runtime: Runtime = "qtool",
) -> Weights:
    """The weights of a folder in bitsandbytes' layout, as they lie in it."""
    stocks = [_stored_stock(weight, architecture, element_bytes) for weight in packed.values()]
    taken = {part.name for weight in packed.values() for part in weight.statistics.values()}
    taken |= packed.keys()
    others = (tensor for name, tensor in tensors.items() if name not in taken)
    stocks += [
        _kept_stock(group, count, element_bytes)
        for group, count in take_inventory(others, architecture).items()
    ]
    return _add_up(stocks, element_bytes, compute_bytes, runtime)


def with_packed_head(weights: Weights, head: ModelTensor, precision: QuantizedPrecision) -> Weights:
    """The same with the output head packed once it is loaded, as `generate --head-quant` does.

    A head that is tied to the embedding gets bytes of its own, since the embedding stays.
    """
    fmt = QuantFormat(precision)
    layout = TensorLayout(head.name, FLOATS[weights.element_bytes], head.shape)
    packed_bytes = _device_bytes(packed_layouts(layout, fmt))
    replaced_bytes = 0 if head.tied_to else layout.num_bytes
    place_bytes = Counter(weights.place_bytes)
    place_bytes[AFTER] += packed_bytes - replaced_bytes
    rows, columns = head.shape
    return replace(
        weights,
        device_bytes=weights.device_bytes + packed_bytes - replaced_bytes,
        place_bytes=place_bytes,
        split_bytes=weights.split_bytes + packed_bytes - replaced_bytes,
        read_per_token_bytes=weights.read_per_token_bytes + packed_bytes - layout.num_bytes,
        head_buffer_bytes=piece_rows(rows, columns)[0] * columns * weights.element_bytes,
        more_before_bytes=max(replaced_bytes - packed_bytes, 0),
    )


# -- one group ------------------------------------------------------------------------------------


def _kept_stock(group: TensorGroup, count: int, element_bytes: int) -> _Stock:
    layout = group.layout
    is_float = layout.dtype in FLOAT_DTYPES
    device_bytes = layout.num_elements * element_bytes if is_float else layout.num_bytes
    return _Stock(group, count, layout.num_bytes, device_bytes)


def _packed_stock(group: TensorGroup, count: int, fmt: QuantFormat) -> _Stock:
    packed = _PackedWeight(group.shape, DTYPE_BITS[group.dtype] // 8, fmt.precision, fmt.blocksize)
    return _Stock(group, count, *_packed_bytes(group.layout, fmt), packed)


@lru_cache(maxsize=256)  # every layer has matrices of the same few shapes
def _packed_bytes(layout: TensorLayout, fmt: QuantFormat) -> tuple[int, int]:
    """In the file, and on the device."""
    parts = packed_layouts(layout, fmt)
    return _sum_bytes(parts), _device_bytes(parts)


def _stored_stock(
    weight: QuantizedWeight, architecture: Architecture, element_bytes: int
) -> _Stock:
    parameter = architecture.find(weight.name)
    shape = weight.weight.shape if parameter is None else parameter.shape
    place = place_of(parameter) if parameter else 0
    parts = (weight.weight, *weight.statistics.values())
    return _Stock(
        TensorGroup("linear", place, weight.weight.dtype, shape),
        1,
        _sum_bytes(parts),
        _device_bytes(parts),
        # The JSON that knows what it was quantized from is data, not header.
        _PackedWeight(shape, element_bytes, weight.precision, _blocksize(weight, shape)),
    )


def _blocksize(weight: QuantizedWeight, shape: tuple[int, ...]) -> int:
    """Weights that share an absmax; 1 where rows do."""
    absmax = weight.statistics.get("absmax")
    if absmax is None:
        return 1
    if not absmax.num_elements:
        raise QtoolError(
            f"{file_place(absmax)}: expected a number per block of {weight.name}, found none",
            kind="bad_file",
            hint=("fetch the weights again; ", Option("verify", True, "inspect"), " finds more"),
        )
    return max(math.prod(shape) // absmax.num_elements, 1)


def _sum_bytes(parts: Iterable[TensorLayout]) -> int:
    return sum(part.num_bytes for part in parts)


def _device_bytes(parts: Iterable[TensorLayout]) -> int:
    return _sum_bytes(part for part in parts if is_on_device(part))


def is_on_device(part: TensorLayout) -> bool:
    """Not so for the code table, which is a constant, the JSON and INT8's format number."""
    *_, last = part.name.split(".")
    return last not in ("quant_map", "weight_format") and not last.startswith("bitsandbytes__")


# -- all groups -----------------------------------------------------------------------------------


def _add_up(
    stocks: Iterable[_Stock], element_bytes: int, compute_bytes: int, runtime: Runtime = "qtool"
) -> Weights:
    checkpoint_bytes = read_bytes = split_bytes = 0
    place_bytes: Counter[Place] = Counter()
    buffer = NO_BUFFER
    for stock in stocks:
        group, device_bytes = stock.group, stock.count * stock.device_bytes
        checkpoint_bytes += stock.count * stock.file_bytes
        if group.role == "file":
            continue
        place_bytes[group.place] += device_bytes
        if len(group.shape) > 1:  # norms and biases are not worth dividing
            split_bytes += device_bytes
        if group.role != "lookup":
            read_bytes += device_bytes * group.experts_per_token // group.num_experts
        if stock.packed is not None:
            making = _buffer if runtime == "qtool" else _whole_weight_buffer
            found = making(stock.packed, compute_bytes)
            buffer = max(buffer, found, key=lambda buffer: buffer.dequantizing_bytes)
    return Weights(
        checkpoint_bytes=checkpoint_bytes,
        device_bytes=place_bytes.total(),
        place_bytes=place_bytes,
        split_bytes=split_bytes,
        read_per_token_bytes=read_bytes,
        buffer=buffer,
        element_bytes=element_bytes,
        compute_bytes=compute_bytes,
    )


def piece_rows(num_rows: int, columns: int) -> list[int]:
    """The rows that are dequantized at a time, of a matrix of so many rows and columns: the first
    two of the pieces that are alike, and the rest."""
    most = rows_at_a_time(columns)
    full, rest = divmod(num_rows, most)
    return [most] * min(full, 2) + [rest] * bool(rest)


def _buffer(weight: _PackedWeight, compute_bytes: int) -> DequantBuffer:
    """What multiplying by the weight takes: a piece of it as it was before it was packed, and once
    more where products are computed in another dtype."""
    columns = weight.shape[-1]
    pieces = piece_rows(math.prod(weight.shape[:-1]), columns)
    piece = pieces[0] * columns
    if weight.precision == "int8":
        product_bytes = piece * compute_bytes
        values_bytes = min(piece, CHUNK_ELEMENTS) * FLOAT32_BYTES
        return DequantBuffer(product_bytes + values_bytes, product_bytes)
    converted_bytes = piece * compute_bytes if compute_bytes != weight.decoded_bytes else 0
    num_bytes = piece * weight.decoded_bytes + converted_bytes
    return DequantBuffer(num_bytes, num_bytes)


def _whole_weight_buffer(weight: _PackedWeight, compute_bytes: int) -> DequantBuffer:
    """bitsandbytes dequantizes a whole weight; with double quantization its absmax in float32 is
    made twice, before and after the offset is added. INT8 multiplies without."""
    if weight.precision == "int8":
        return NO_BUFFER
    num_elements = math.prod(weight.shape)
    num_bytes = num_elements * compute_bytes
    if weight.precision.endswith("-dq"):
        num_bytes += 2 * FLOAT32_BYTES * -(-num_elements // weight.blocksize)
    return DequantBuffer(num_bytes, num_bytes)
