"""What loading takes: transformers' from_pretrained, followed through the caching allocator.

transformers first reserves one block for all weights (`caching_allocator_warmup`), then brings each
tensor to the device in 16 bit, by name, and packs it there. So the peak is the packed model, the
largest tensors in 16 bit, and what the allocator rounds; it is what max_memory_allocated shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from qtool.architecture import Architecture, ModelTensor
from qtool.formats.bitsandbytes import packed_layouts
from qtool.formats.precisions import QuantFormat
from qtool.formats.tensors import TensorLayout
from qtool.planner.allocator import Block, CachingAllocator
from qtool.planner.units import FLOAT32_BYTES, HALF_BYTES
from qtool.planner.weights import is_on_device

WARM_UP_BITS: Final = {"int8": 8}  # per packed weight in transformers' own reckoning; else 4
INT8_SOURCE_BYTES: Final = HALF_BYTES  # bitsandbytes casts to float16 first


@dataclass(frozen=True, slots=True)
class Loading:
    """What the allocator handed out when all is loaded, and the most meanwhile."""

    allocated_bytes: int
    peak_bytes: int


def load_with_transformers(
    architecture: Architecture, packed: Iterable[str], fmt: QuantFormat | None, element_bytes: int
) -> Loading:
    """Load a 16-bit checkpoint, quantizing on the way.

    Args:
        packed: names of the weights that become `fmt`; none where `fmt` is None.
        element_bytes: of the dtype that the checkpoint is loaded in.
    """
    names = frozenset(packed)
    tensors = [tensor for tensor in architecture.tensors.values() if tensor.tied_to is None]
    tensors.sort(key=lambda tensor: tensor.name)
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(_warm_up_bytes(tensors, names, fmt, element_bytes)))
    allocator.peak_bytes = 0
    for tensor in tensors:
        layout = TensorLayout(tensor.name, _DTYPES[element_bytes], tensor.shape)
        if fmt is None or tensor.name not in names:
            allocator.allocate(layout.num_bytes)
        else:
            _pack(allocator, layout, fmt)
    return Loading(allocator.allocated_bytes, allocator.peak_bytes)


_DTYPES: Final = {2: "BF16", 4: "F32"}


def _pack(allocator: CachingAllocator, source: TensorLayout, fmt: QuantFormat) -> None:
    """The source comes and goes; with it a float16 copy, or absmax before they are quantized."""
    passing: list[Block] = [allocator.allocate(source.num_bytes)]
    weight_bytes, *statistics_bytes = _packed_sizes(source.dtype, source.shape, fmt)
    if fmt.is_int8:
        passing.append(allocator.allocate(source.num_elements * INT8_SOURCE_BYTES))
    allocator.allocate(weight_bytes)
    if fmt.double_quant:
        num_blocks = -(-source.num_elements // fmt.blocksize)
        passing.append(allocator.allocate(num_blocks * FLOAT32_BYTES))
    for num_bytes in statistics_bytes:
        allocator.allocate(num_bytes)
    for block in reversed(passing):
        allocator.free(block)


@lru_cache
def _packed_sizes(dtype: str, shape: tuple[int, ...], fmt: QuantFormat) -> tuple[int, ...]:
    """Bytes on the device of a packed weight and its statistics; layers repeat few shapes."""
    weight, *statistics = packed_layouts(TensorLayout("weight", dtype, shape), fmt)
    return (weight.num_bytes, *(part.num_bytes for part in statistics if is_on_device(part)))


def _warm_up_bytes(
    tensors: Iterable[ModelTensor],
    packed: frozenset[str],
    fmt: QuantFormat | None,
    element_bytes: int,
) -> int:
    packed_bits = WARM_UP_BITS.get(fmt.precision, 4) if fmt else 0
    return sum(
        _num_elements(tensor) * (packed_bits if tensor.name in packed else 8 * element_bytes) // 8
        for tensor in tensors
    )


def _num_elements(tensor: ModelTensor) -> int:
    return TensorLayout(tensor.name, "U8", tensor.shape).num_elements
