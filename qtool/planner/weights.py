"""A model's weights at each precision: bytes on disk, bytes on the device, the largest product.

Quantized sizes come from the quantizer's own plan, so they are what it will write. A full precision
is a plain cast of every floating-point tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qtool.architecture import Architecture
from qtool.formats.bitsandbytes import QuantizedWeight
from qtool.formats.tensors import DTYPE_BITS, TensorLayout
from qtool.planner.activations import NO_BUFFER, DequantBuffer
from qtool.quantize.plan import Recipe, plan_tensors

CAST_DTYPES: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FLOAT_DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})

COMPUTE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

# How qtool's packed linear layers multiply (tests hold these against the runtime): a weight becomes
# floating point in pieces of whole rows, each piece in chunks through float32. 4-bit chunks take
# an int32 index per pair of values, and the values of one chunk live until the next are made.
PIECE_ELEMENTS: Final = 1 << 26
CHUNK_ELEMENTS: Final = 1 << 24
FLOAT32_BYTES: Final = 4
INDEX_BYTES: Final = 2  # per value


@dataclass(frozen=True, slots=True)
class Weights:
    """One model at one precision.

    `checkpoint_bytes` is the sum of the tensors in its files, `device_bytes` what lies on the
    device when it runs, `read_per_token_bytes` the part of it that computing a token reads,
    `buffer` the most that multiplying by a packed weight takes beside. Activations have
    `element_bytes`, products with packed weights are computed in `compute_bytes`.
    """

    checkpoint_bytes: int
    device_bytes: int
    read_per_token_bytes: int
    buffer: DequantBuffer
    element_bytes: int
    compute_bytes: int


@dataclass(frozen=True, slots=True)
class _PackedWeight:
    """A packed linear weight [out, in], and the tensors that hold it.

    `decoded_bytes` per element of what dequantizing rounds to: the dtype it was quantized from.
    """

    shape: tuple[int, ...]
    decoded_bytes: int
    precision: str
    blocksize: int
    parts: tuple[TensorLayout, ...]


def cast_weights(
    layouts: Iterable[TensorLayout], architecture: Architecture | None, precision: str
) -> Weights:
    """The weights in fp32, bf16 or fp16."""
    dtype = CAST_DTYPES[precision]
    cast = [
        TensorLayout(t.name, dtype if t.dtype in FLOAT_DTYPES else t.dtype, t.shape)
        for t in layouts
    ]
    element_bytes = DTYPE_BITS[dtype] // 8
    return _add_up(cast, (), architecture, element_bytes, element_bytes)


def quantized_weights(
    layouts: Iterable[TensorLayout],
    architecture: Architecture,
    recipe: Recipe,
    element_bytes: int,
) -> Weights:
    """The weights as `qtool quantize` writes them; `element_bytes` of what stays unpacked."""
    fmt = recipe.format
    plans = plan_tensors(layouts, architecture, recipe)
    copied = [plan.outputs[0] for plan in plans if plan.action == "copy"]
    packed = [
        _PackedWeight(
            plan.source.shape[::-1] if plan.transposed else plan.source.shape,
            DTYPE_BITS[plan.source.dtype] // 8,
            fmt.precision,
            fmt.blocksize,
            plan.outputs,
        )
        for plan in plans
        if plan.action == "quantize"
    ]
    # config.json tells 4-bit readers what to compute in; int8 follows the activations.
    compute_bytes = element_bytes if fmt.is_int8 else COMPUTE_BYTES[recipe.compute_dtype]
    return _add_up(copied, packed, architecture, element_bytes, compute_bytes)


def stored_weights(
    tensors: Mapping[str, TensorLayout],
    packed: Mapping[str, QuantizedWeight],
    architecture: Architecture,
    element_bytes: int,
    compute_bytes: int,
) -> Weights:
    """The weights of a folder that is quantized already, as they lie in it."""
    groups = [
        _stored_group(quantized, architecture, element_bytes) for quantized in packed.values()
    ]
    taken = {part.name for group in groups for part in group.parts}
    copied = [tensor for name, tensor in tensors.items() if name not in taken]
    return _add_up(copied, groups, architecture, element_bytes, compute_bytes)


def _stored_group(
    quantized: QuantizedWeight, architecture: Architecture, element_bytes: int
) -> _PackedWeight:
    parameter = architecture.find(quantized.name)
    shape = quantized.weight.shape if parameter is None else parameter.shape
    absmax = quantized.statistics.get("absmax")
    return _PackedWeight(
        shape=shape,
        decoded_bytes=element_bytes,  # the JSON that knows better is data, not header
        precision=quantized.precision,
        blocksize=math.prod(shape) // absmax.num_elements if absmax else 1,
        parts=(quantized.weight, *quantized.statistics.values()),
    )


def _add_up(
    copied: Iterable[TensorLayout],
    packed: Iterable[_PackedWeight],
    architecture: Architecture | None,
    element_bytes: int,
    compute_bytes: int,
) -> Weights:
    checkpoint_bytes = device_bytes = looked_up_bytes = 0
    buffer = NO_BUFFER
    loaded: set[str] = set()
    for tensor in copied:
        checkpoint_bytes += tensor.num_bytes
        parameter = architecture.find(tensor.name) if architecture else None
        if architecture is not None and parameter is None:
            continue  # nothing that the model loads
        storage = tensor.name if parameter is None else parameter.tied_to or parameter.name
        if storage in loaded:
            continue  # both ends of tied weights are stored, one is kept
        loaded.add(storage)
        is_float = tensor.dtype in FLOAT_DTYPES
        resident_bytes = tensor.num_elements * element_bytes if is_float else tensor.num_bytes
        device_bytes += resident_bytes
        if architecture is not None and _is_looked_up(storage, architecture):
            looked_up_bytes += resident_bytes
    for group in packed:
        checkpoint_bytes += sum(part.num_bytes for part in group.parts)
        device_bytes += sum(part.num_bytes for part in group.parts if _is_on_device(part))
        buffer = max(buffer, _buffer(group, compute_bytes), key=_dequantizing_bytes)
    return Weights(
        checkpoint_bytes=checkpoint_bytes,
        device_bytes=device_bytes,
        read_per_token_bytes=device_bytes - looked_up_bytes,
        buffer=buffer,
        element_bytes=element_bytes,
        compute_bytes=compute_bytes,
    )


def _is_looked_up(name: str, architecture: Architecture) -> bool:
    """An embedding of which a token reads one row; a tied one is multiplied by as the head."""
    if architecture.tensors[name].kind != "embedding":
        return False
    return all(parameter.tied_to != name for parameter in architecture.tensors.values())


def _is_on_device(part: TensorLayout) -> bool:
    """Not so for the code table, which is a constant, the JSON and INT8's format number."""
    *_, last = part.name.split(".")
    return last not in ("quant_map", "weight_format") and not last.startswith("bitsandbytes__")


def _buffer(weight: _PackedWeight, compute_bytes: int) -> DequantBuffer:
    """What multiplying by the weight takes: a floating-point piece, and making it from codes."""
    num_elements, columns = math.prod(weight.shape), weight.shape[-1]
    piece = min(num_elements, max(PIECE_ELEMENTS // columns, 1) * columns)
    product_bytes = piece * compute_bytes
    if weight.precision == "int8":
        values_bytes = min(piece, CHUNK_ELEMENTS) * FLOAT32_BYTES
        return DequantBuffer(product_bytes + values_bytes, product_bytes)
    decoded_bytes = piece * weight.decoded_bytes
    if weight.precision.endswith("-dq"):
        decoded_bytes += -(-num_elements // weight.blocksize) * FLOAT32_BYTES  # absmax
    converted_bytes = product_bytes if compute_bytes != weight.decoded_bytes else 0
    making_bytes = max(_chunk_bytes(piece), converted_bytes)
    return DequantBuffer(decoded_bytes + making_bytes, product_bytes)


def _chunk_bytes(piece: int) -> int:
    """The most that the 4-bit chunks of `piece` elements take at once."""
    first = min(piece, CHUNK_ELEMENTS)
    second = min(piece - first, CHUNK_ELEMENTS)
    alone_bytes = first * (FLOAT32_BYTES + INDEX_BYTES)
    return max(alone_bytes, first * FLOAT32_BYTES + second * (FLOAT32_BYTES + INDEX_BYTES))


def _dequantizing_bytes(buffer: DequantBuffer) -> int:
    return buffer.dequantizing_bytes
