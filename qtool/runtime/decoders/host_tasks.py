"""The tasks of a step on the processor: operators, and the records that tell them what to do.

Addresses in records point to the model's weights, to buffers that flow between tasks, and to small
copies in float32, which `TaskMaker` keeps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cupy_kernels.linear_few import LinearKind, LinearWeight
from qtool.backends import cpu_records as at
from qtool.backends.cpu import BIT_DTYPES
from qtool.backends.cpu_attention import attention_floats, attention_operator, merge_operator
from qtool.backends.cpu_products import GROUP, PAIRS_GROUP, has_bfloat16_products
from qtool.backends.cpu_rows import ROWS
from qtool.backends.cpu_step import (
    added_norm_operator,
    embedding_operator,
    product_floats,
    products_operator,
)
from qtool.formats.codebooks import CODES
from qtool.runtime.decoders.blocks import Attention, Block, FusableNetwork, Norm, PackedRows
from qtool.runtime.decoders.fused_adapters import AdapterGroup, adapters_of
from qtool.runtime.dequantize_host import SOURCE_DTYPES

EPILOGUES: Final = {
    "silu": at.SILU,
    "gelu_tanh": at.GELU_TANH,
    "gelu": at.GELU,
}
# An item takes some microseconds, a hundred times what it takes to hand it out; and each thread
# gets some of every task, since one that is late or interrupted holds up the others.
MIN_ITEM_ELEMENTS: Final = 1 << 15
MAX_ITEM_ELEMENTS: Final = 1 << 18
ITEMS_PER_THREAD: Final = 8


@dataclass(slots=True)
class Task:
    """One operator's work; `record` goes by place.

    `follows` is set where all tasks before must be done first; else it goes beside the last. With
    `awaits` it begins beside inner values, and waits for them where it adds an adapter.
    """

    operator: Any
    record: dict[int, int]
    num_items: int
    follows: bool = True
    awaits: bool = False


@dataclass(frozen=True, slots=True)
class Angles:
    """Of rotary embeddings: cosines and sines float32 (capacity, rotary_dim / 2) for each type of
    layer."""

    rotary_dim: int
    tables: Mapping[str, tuple[Tensor, Tensor]]


class TaskMaker:
    """Makes the tasks of a network's step for texts of up to `capacity` tokens.

    Attributes:
        scratch_floats: what each of the places of a thread's scratch needs.
    """

    def __init__(
        self, network: FusableNetwork, angles: Angles, *, capacity: int, num_threads: int
    ) -> None:
        self._network, self._angles = network, angles
        self._num_threads = num_threads
        self._rounds = int(network.dtype == torch.bfloat16)
        self._kept: list[Tensor] = []
        self._num_inputs = 0
        self._most_strips = -(-capacity // at.STRIP)
        self._widest = self._most_rows = 0
        self._inner = 0  # address of the inner values of one group at a time

    def tasks(self, logits: Tensor) -> Iterator[Task]:
        """All of a step, in order; `logits` float32 (1, vocabulary) is what it fills."""
        network = self._network
        first = network.blocks[0]
        hidden = self._buffer(network.hidden_size)
        query_key_value = self._buffer(sum(it.weight.rows for it in first.query_key_value))
        attended = self._buffer(network.num_heads * network.head_dim)
        gated = self._buffer(max(block.gate_up[0].weight.rows for block in network.blocks))
        strip = network.head_dim + at.PARTIAL_EXTRA
        partials = self._buffer(network.num_heads * self._most_strips * strip)
        added = self._buffer(network.hidden_size)
        adapters_of_blocks = adapters_of(network)
        groups = [group for adapters in adapters_of_blocks for group in adapters.groups]
        self._inner = self._buffer(max((group.a.shape[0] for group in groups), default=0))
        yield self._embedding(hidden)
        for block, adapters in zip(network.blocks, adapters_of_blocks, strict=True):
            group, norm = adapters.query_key_value, block.attention_norm
            yield from self._products(block.query_key_value, hidden, query_key_value, norm, group)
            yield from self._attend(block.attention, query_key_value, attended, partials)
            yield from self._add(
                block.output, attended, hidden, block.output_norm, added, adapters.output
            )
            yield from self._gated(block, hidden, gated, adapters.gate_up)
            yield from self._add(block.down, gated, hidden, block.down_norm, added, adapters.down)
        (head,) = self._products((network.head,), hidden, self._keep(logits), network.final_norm)
        head.record[at.SOFTCAP] = _float_bits(network.logit_softcap)
        yield head

    @property
    def scratch_floats(self) -> list[int]:
        network = self._network
        group = network.num_heads // network.num_kv_heads
        attention = attention_floats(group, network.head_dim)
        return [*product_floats(self._widest, self._most_rows), attention]

    # -- one task each ----------------------------------------------------------------------------

    def _embedding(self, hidden: int) -> Task:
        network = self._network
        record = {
            at.ROUNDS: self._rounds,
            at.EMBEDDING: network.embedding.data_ptr(),
            at.HIDDEN: hidden,
            at.HIDDEN_SIZE: network.hidden_size,
            at.EMBEDDING_SCALE: _float_bits(network.embedding_scale or 0.0),
        }
        return Task(embedding_operator(kept_as(network.dtype)), record, 1)

    def _products(
        self,
        layers: Sequence[PackedRows],
        x: int,
        out: int,
        norm: Norm | None,
        group: AdapterGroup | None = None,
        epilogue: int = at.STORED,
    ) -> Iterator[Task]:
        """Layers of the same input, side by side in `out`, with their adapters."""
        normed = self._norm(norm)
        self._num_inputs += 1
        yield from self._inner_values(group, x, normed)
        for number, layer in enumerate(layers):
            record = self._product(layer, x, out, epilogue) | normed
            record |= self._adapter(group, number, at.FIRST_ADAPTER)
            yield self._product_task(layer, record, group, follows=number == 0)
            out += 4 * layer.weight.rows

    def _inner_values(
        self, group: AdapterGroup | None, x: int, normed: dict[int, int]
    ) -> Iterator[Task]:
        """Those of a group's adapters; the products behind begin before they are there."""
        if group is None:
            return
        rows, columns = group.a.shape
        kind = LinearKind("plain", columns, SOURCE_DTYPES[self._network.dtype])
        layer = PackedRows(kind, LinearWeight(rows, self._keep(group.a)))
        record = self._product(layer, x, self._inner, at.INNER) | normed
        record[at.SCALES] = self._keep(group.scales)
        yield self._product_task(layer, record, None, follows=True)

    def _add(
        self,
        layer: PackedRows,
        x: int,
        hidden: int,
        norm: Norm | None,
        added: int,
        group: AdapterGroup | None,
    ) -> Iterator[Task]:
        """Add a layer's results to the hidden state; through a norm if there is one."""
        if norm is None:
            yield from self._products((layer,), x, hidden, None, group, at.ADDED)
            return
        yield from self._products((layer,), x, added, None, group)
        record = {
            at.ROUNDS: self._rounds,
            at.X: added,
            at.WIDTH: self._network.hidden_size,
            at.OUT: hidden,
        }
        yield Task(added_norm_operator(), record | self._norm(norm), 1)

    def _gated(self, block: Block, x: int, out: int, group: AdapterGroup | None) -> Iterator[Task]:
        gate, up = block.gate_up
        normed = self._norm(block.mlp_norm)
        self._num_inputs += 1
        yield from self._inner_values(group, x, normed)
        record = self._product(gate, x, out, EPILOGUES[self._network.gate]) | normed
        record |= self._weight(up, at.SECOND_WEIGHT)
        record |= self._adapter(group, 0, at.FIRST_ADAPTER)
        record |= self._adapter(group, 1, at.SECOND_ADAPTER)
        yield self._product_task(gate, record, group, follows=True)

    def _attend(
        self, attention: Attention, query_key_value: int, attended: int, partials: int
    ) -> Iterator[Task]:
        """Without what the cache and the position have to say; how strips are merged comes last."""
        network = self._network
        cosines, sines = self._angles.tables[attention.layer_type]
        query_norm, key_norm = self._norm(attention.query_norm), self._norm(attention.key_norm)
        record = {
            at.ROUNDS: self._rounds,
            at.QUERY_KEY_VALUE: query_key_value,
            at.ATTENDED: attended,
            at.GROUP_SIZE: network.num_heads // network.num_kv_heads,
            at.KV_HEADS: network.num_kv_heads,
            at.HEAD_DIM: network.head_dim,
            at.ROTARY_DIM: self._angles.rotary_dim,
            at.COSINES: self._keep(cosines),
            at.SINES: self._keep(sines),
            at.QUERY_NORM: query_norm.get(at.NORM, 0),
            at.KEY_NORM: key_norm.get(at.NORM, 0),
            at.HEAD_EPSILON: query_norm.get(at.EPSILON, 0),
            at.HEAD_NORM_ROUNDS_ONCE: query_norm.get(at.NORM_ROUNDS_ONCE, 0),
            at.SCALE: _float_bits(attention.scale),
            at.SCORE_SOFTCAP: _float_bits(attention.softcap),
            at.WINDOW: attention.window,
            at.PARTIALS: partials,
        }
        operator = attention_operator(
            kept_as(network.dtype), network.head_dim, record[at.GROUP_SIZE]
        )
        yield Task(operator, record, network.num_kv_heads)
        yield Task(merge_operator(), record, 0)

    # -- parts of records -------------------------------------------------------------------------

    def _product(self, layer: PackedRows, x: int, out: int, epilogue: int) -> dict[int, int]:
        rows, width = layer.weight.rows, layer.kind.columns
        item_rows = _item_rows(rows, width, self._num_threads)
        self._widest = max(self._widest, width)
        self._most_rows = max(self._most_rows, item_rows)
        record = {
            at.ROUNDS: self._rounds,
            at.X: x,
            at.WIDTH: width,
            at.NUM_ROWS: rows,
            at.ITEM_ROWS: item_rows,
            at.NUM_RUNS: self._num_threads,
            at.OUT: out,
            at.EPILOGUE: epilogue,
        }
        return record | self._weight(layer, at.FIRST_WEIGHT)

    def _product_task(
        self,
        layer: PackedRows,
        record: dict[int, int],
        group: AdapterGroup | None,
        *,
        follows: bool,
    ) -> Task:
        """`follows` is set for the first one of an input; if there is a group, it goes beside
        that one's inner values."""
        kind, dtype = layer.kind, self._network.dtype
        # A thread arranges an input once for each way in which layers take it.
        way = 2 * int(_takes_pairs(kind, dtype)) + int(kind.format in CODES)
        record[at.INPUT] = 4 * self._num_inputs + way
        operator = operator_for(kind, dtype)
        num_items = -(-layer.weight.rows // record[at.ITEM_ROWS])
        awaits = group is not None
        return Task(operator, record, num_items, follows and not awaits, awaits)

    def _weight(self, layer: PackedRows, place: int) -> dict[int, int]:
        kind, weight = layer.kind, layer.weight
        code = CODES[kind.format] if kind.format in ("nf4", "fp4") else None
        return {
            place + at.WEIGHT: weight.weight,
            place + at.ABSMAX: weight.absmax_codes if kind.nested else weight.absmax,
            place + at.NESTED_ABSMAX: weight.nested_absmax,
            place + at.NESTED_MAP: weight.nested_quant_map,
            place + at.NESTED_OFFSET: weight.nested_offset,
            place + at.CODE: 0 if code is None else code.ctypes.data,
            place + at.SHIFT: (kind.blocksize // GROUP).bit_length() - 1,
            place + at.BIAS: 0 if layer.bias is None else self._floats(layer.bias),
        }

    def _adapter(self, group: AdapterGroup | None, number: int, place: int) -> dict[int, int]:
        """Of layer `number` of a group."""
        part = None if group is None else group.parts[number]
        if part is None:
            return {}
        rows, rank = part.b.shape
        stride = (-(-rows // at.ADAPTER_LANES) + 1) * at.ADAPTER_LANES
        b = functional.pad(part.b.t(), (0, stride - rows)).contiguous()
        return {
            place + at.B: self._keep(b),
            place + at.STRIDE: stride,
            place + at.INNER_VALUES: self._inner + 4 * part.first,
            place + at.RANK: rank,
        }

    def _norm(self, norm: Norm | None) -> dict[int, int]:
        if norm is None:
            return {}
        weight = norm.weight.float() + 1 if norm.plus_one else norm.weight
        return {
            at.NORM: self._floats(weight),
            at.EPSILON: _float_bits(norm.epsilon),
            at.NORM_ROUNDS_ONCE: int(norm.plus_one),
        }

    # -- memory -----------------------------------------------------------------------------------

    def _buffer(self, size: int) -> int:
        return self._keep(torch.zeros(size))

    def _floats(self, values: Tensor) -> int:
        return self._keep(values.detach().float().clone())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _item_rows(rows: int, width: int, num_threads: int) -> int:
    """A multiple of what is multiplied at once."""
    share = -(-rows // (num_threads * ITEMS_PER_THREAD))
    share = min(max(share, MIN_ITEM_ELEMENTS // width), MAX_ITEM_ELEMENTS // width)
    return -(-max(share, 1) // ROWS) * ROWS


def operator_for(kind: LinearKind, dtype: torch.dtype) -> Any:
    """The operator of products with layers of a kind, for activations of `dtype`."""
    pairs = _takes_pairs(kind, dtype)
    return products_operator(*_dtypes(kind), np.uint16 if pairs else np.float32, kept_as(dtype))


def _takes_pairs(kind: LinearKind, dtype: torch.dtype) -> bool:
    """Whether activations and weights are bfloat16, and the processor multiplies such pairs."""
    fits = kind.columns % PAIRS_GROUP == 0 and kind.dtype == "BF16"
    return fits and dtype == torch.bfloat16 and has_bfloat16_products()


def _dtypes(kind: LinearKind) -> tuple[Any, Any, Any]:
    """What is stored, absmax, and what weights are rounded to, as operators are told."""
    rounded_to = BIT_DTYPES[kind.dtype]  # type: ignore[index]
    if kind.format == "plain":
        return np.uint16 if kind.dtype == "BF16" else np.float32, np.float32, rounded_to
    if kind.format == "int8":
        return np.int8, np.float32, rounded_to
    return np.uint8, np.uint8 if kind.nested else np.float32, rounded_to


def kept_as(dtype: torch.dtype) -> Any:
    """How operators are told the dtype of embedding, adapters and cache."""
    return np.uint16 if dtype == torch.bfloat16 else np.float32


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits
