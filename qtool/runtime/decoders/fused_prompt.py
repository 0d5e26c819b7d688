"""A prompt through the common decoder block: PyTorch's products and attention, our kernels between.

Each packed layer is dequantized into one scratch buffer, out of which PyTorch multiplies at once,
while the second-level cache still holds most of it. Nothing waits for the device, and a block takes
some twenty launches, so that the host stays ahead of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cupy_kernels.dequantize_4bit import NestedAbsmax, dequantize_4bit
from cupy_kernels.dequantize_int8_rows import dequantize_int8_rows
from cupy_kernels.linear_few import NormWeight
from cupy_kernels.prompt_rows import Rows, gated_rows, norm_rows
from qtool.runtime.decoders.blocks import Block, FusableNetwork, Norm, NotFusable, PackedRows
from qtool.runtime.decoders.fused_attention import AttentionLaunches
from qtool.runtime.products import KERNEL_DTYPES, MAX_DEQUANTIZED_ELEMENTS, PIECE_ROWS


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [start, stop) of a layer, that are dequantized at a time."""

    layer: PackedRows
    start: int
    stop: int


class FusedPrompt:
    """Runs prompts over a cache of `FixedLayer`s.

    Raises:
        NotFusable: attention that PyTorch's fused one does not do, or a layer that cannot be
            dequantized piece by piece.
    """

    def __init__(
        self, network: FusableNetwork, attention: AttentionLaunches, cache: Any, capacity: int
    ) -> None:
        self._network = network
        self._attention = attention
        self._layers = cache.layers
        for block in network.blocks:
            _check(block, capacity)
        self._dtype = KERNEL_DTYPES[network.dtype]

    def run(self, input_ids: Tensor, start: int) -> Tensor:
        """Take up tokens int64 (batch, n) at positions from `start` on.

        Returns:
            The hidden state of each sequence's last token, before the final norm (batch, hidden).
        """
        network = self._network
        batch, num_tokens = input_ids.shape
        hidden = torch.embedding(network.embedding, input_ids.reshape(-1))
        if network.embedding_scale is not None:
            hidden *= network.embedding_scale
        for index, block in enumerate(network.blocks):
            normed = self._norm(hidden, block.attention_norm)
            attended = self._attend(index, block, normed, batch, start)
            self._add_product(block.output, attended, hidden)
            self._norm(hidden, block.mlp_norm, out=normed)
            self._add_product(block.down, self._gate(block, normed), hidden)
        return hidden.view(batch, num_tokens, -1)[:, -1]

    def _norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        kind = "rms_plus_one" if norm.plus_one else "rms"
        weight = NormWeight(norm.weight.data_ptr(), norm.epsilon)
        rows = Rows(x.shape[0], x.shape[1], self._dtype)
        norm_rows(rows, kind, weight, x.data_ptr(), out.data_ptr(), _stream(x))  # type: ignore[arg-type]
        return out

    def _attend(self, index: int, block: Block, normed: Tensor, batch: int, start: int) -> Tensor:
        """Attention of all tokens (batch * n, heads * head_dim)."""
        network, layer = self._network, self._layers[index]
        num_tokens = normed.shape[0] // batch
        query_key_value = self._products(block.query_key_value, normed)
        queries = normed.new_empty(batch, network.num_heads, num_tokens, network.head_dim)
        self._attention.take_up(index, query_key_value, queries, start)
        stop = start + num_tokens
        # Causal with the last query at the last key, which is what the operator itself does; its
        # public face would not take fewer queries than keys.
        attended = torch.ops.aten._scaled_dot_product_flash_attention(
            queries,
            layer.keys[:, :, :stop],
            layer.values[:, :, :stop],
            0.0,
            True,
            scale=block.attention.scale,
        )[0]
        return cast(Tensor, attended).transpose(1, 2).reshape(batch * num_tokens, -1)

    def _gate(self, block: Block, normed: Tensor) -> Tensor:
        gate = self._products(block.gate_up[:1], normed)
        up = self._products(block.gate_up[1:], normed)
        rows = Rows(gate.shape[0], gate.shape[1], self._dtype)
        addresses = (gate.data_ptr(), up.data_ptr(), gate.data_ptr())
        gated_rows(rows, self._network.gate, *addresses, _stream(gate))
        return gate

    # -- products ---------------------------------------------------------------------------------

    def _products(self, layers: Sequence[PackedRows], x: Tensor) -> Tensor:
        """Layers side by side (n, rows of all)."""
        out = x.new_empty(x.shape[0], sum(layer.weight.rows for layer in layers))
        start = 0
        for pieces in _groups(layers):
            weight = self._dequantize(pieces, x)
            place = out[:, start : start + weight.shape[0]]
            torch.mm(x, weight.t(), out=place)
            start += weight.shape[0]
        biases = [layer.bias for layer in layers]
        if any(bias is not None for bias in biases):
            out += torch.cat([bias for bias in biases if bias is not None])
        return out

    def _add_product(self, layer: PackedRows, x: Tensor, hidden: Tensor) -> None:
        start = 0
        for pieces in _groups([layer]):
            weight = self._dequantize(pieces, x)
            hidden[:, start : start + weight.shape[0]].addmm_(x, weight.t())
            start += weight.shape[0]
        if layer.bias is not None:
            hidden += layer.bias

    def _dequantize(self, pieces: Sequence[_Piece], x: Tensor) -> Tensor:
        """The rows of all pieces, one after the other, in the dtype of `x`."""
        first = pieces[0]
        if first.layer.plain is not None and len(pieces) == 1:
            return first.layer.plain[first.start : first.stop]
        columns = x.shape[1]
        weight = x.new_empty(sum(piece.stop - piece.start for piece in pieces), columns)
        start = 0
        for piece in pieces:
            target = weight[start : start + piece.stop - piece.start]
            if piece.layer.plain is not None:
                target.copy_(piece.layer.plain[piece.start : piece.stop])
            else:
                _launch_dequantize(piece, target, self._dtype)
            start += target.shape[0]
        return weight


def _launch_dequantize(piece: _Piece, target: Tensor, dtype: str) -> None:
    kind, weight = piece.layer.kind, piece.layer.weight
    first, stream = piece.start * kind.columns, _stream(target)
    num_rows, columns = target.shape
    if kind.format == "int8":
        codes, scb = weight.weight + first, weight.absmax + piece.start * 4
        dequantize_int8_rows(codes, num_rows, columns, scb, dtype, target.data_ptr(), stream)
        return
    block = first // kind.blocksize
    absmax: int | NestedAbsmax = weight.absmax + block * 4
    if kind.nested:
        absmax = NestedAbsmax(
            weight.absmax_codes + block,
            weight.nested_absmax + block // 256 * 4,
            weight.nested_quant_map,
            weight.nested_offset,
        )
    dequantize_4bit(
        weight.weight + first // 2,
        num_rows * columns,
        absmax,
        kind.format,
        kind.blocksize,
        dtype,
        target.data_ptr(),
        stream,
    )


def _groups(layers: Sequence[PackedRows]) -> Iterator[list[_Piece]]:
    """Pieces that are dequantized together, in order: no more elements than one buffer has."""
    columns = layers[0].kind.columns
    most = max(MAX_DEQUANTIZED_ELEMENTS // columns // PIECE_ROWS * PIECE_ROWS, PIECE_ROWS)
    group: list[_Piece] = []
    for layer in layers:
        for start in range(0, layer.weight.rows, most):
            piece = _Piece(layer, start, min(start + most, layer.weight.rows))
            if sum(p.stop - p.start for p in group) + piece.stop - piece.start > most:
                yield group
                group = []
            group.append(piece)
    yield group


def _check(block: Block, capacity: int) -> None:
    if block.attention.softcap or 0 < block.attention.window < capacity:
        raise NotFusable("PyTorch's fused attention has no such mask")
    layers = (*block.query_key_value, block.output, *block.gate_up, block.down)
    for layer in layers:
        elements = layer.weight.rows * layer.kind.columns
        if elements > MAX_DEQUANTIZED_ELEMENTS and layer.kind.columns % layer.kind.blocksize:
            raise NotFusable("a large layer whose rows share blocks")


def _stream(tensor: Tensor) -> int:
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
