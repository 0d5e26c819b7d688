"""The common decoder block on our own kernels: five launches a block and token, in one CUDA graph.

The cache is the one of the graph path, and prompts go through transformers' own model; only the
step of one token is ours: embedding, then per block (norm, query, key and value), (rotary embedding,
cache update, attention), (output, residual), (norm, gate and up, activation), (down, residual), and
at last (norm, head). Each launch begins to load its weights while the one before still works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from cupy_kernels.linear_few import (
    MAX_TOKENS,
    OLDEST_COMPUTE_CAPABILITY,
    Epilogue,
    LinearFew,
    NormWeight,
    Tokens,
)
from qtool.runtime.decoders.blocks import (
    Block,
    FusableNetwork,
    Norm,
    NotFusable,
    PackedRows,
    describe_network,
)
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.fused_attention import AttentionLaunches, attention_shape, check_rotary
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Path
from qtool.runtime.loading import LoadedModel

REASON: Final = "fused kernels, one CUDA graph per token"
# Of the largest logit: how far fused logits may be from those of transformers' own operations.
TOLERANCE: Final = 0.05
NUM_COMPARED: Final = 4

Queue = Callable[[int], None]  # queues a launch on a stream


def why_not_fused(loaded: LoadedModel, batch: int) -> str | None:
    """What speaks against the fused path; None if nothing does."""
    if loaded.device.type != "cuda":
        return ""
    if torch.cuda.get_device_capability(loaded.device) < OLDEST_COMPUTE_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_COMPUTE_CAPABILITY))
        return f"fused kernels need compute capability {oldest}"
    if batch > MAX_TOKENS:
        return f"fused kernels take {MAX_TOKENS} sequences, not {batch}"
    try:
        check_rotary(loaded.model)
        attention_shape(describe_network(loaded.model), loaded.model, batch, capacity=0)
    except NotFusable as reason:
        return str(reason)
    except AttributeError as missing:
        return f"its blocks are built otherwise: {missing}"
    return None


class FusedDecoder(GraphDecoder):
    """A decoder whose graphs hold fused kernels, see `protocol.Decoder`.

    Raises:
        CaptureFailed: the step cannot be recorded, or its logits are not those of the model.
        QtoolError: memory, if the cache does not fit.
    """

    path: Path = "fused"
    path_reason = REASON


class FusedNetwork(Network):
    """A model whose steps of one token run on our kernels, over a cache of `FixedLayer`s."""

    def __init__(self, model: Any, prefill_chunk: int, *, batch: int, capacity: int) -> None:
        super().__init__(model, prefill_chunk)
        self._batch, self._capacity = batch, capacity
        self._network = describe_network(model)
        self._step: _Step | None = None
        self._keys_at = 0

    def logits(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """See `Network.logits`; the model's own way for prompts and for the first token of all."""
        first = cache.layers[0]
        if input_ids.shape[1] > 1 or not first.is_initialized:
            return super().logits(input_ids, positions, cache)
        if self._step is None or self._keys_at != first.keys.data_ptr():
            self._step = _Step(self.model, self._network, cache, self._batch, self._capacity)
            self._keys_at = first.keys.data_ptr()
        return self._step.run(input_ids, positions)

    def check(self, cache: Any) -> None:
        """Compare a few steps with the model's own, over a cache that is filled and left so.

        Raises:
            CaptureFailed: they differ by more than rounding does.
        """
        tokens = torch.arange(1, NUM_COMPARED + 2, device=self.device).expand(self._batch, -1)
        expected = [
            super(FusedNetwork, self).prefill(tokens[:, :stop], 0, cache, in_chunks=False).float()
            for stop in range(2, NUM_COMPARED + 2)
            if not _rewind(cache)
        ]
        _rewind(cache)
        super().prefill(tokens[:, :1], 0, cache, in_chunks=False)
        for at, wanted in enumerate(expected, start=1):
            position = torch.full((self._batch, 1), at, device=self.device)
            found = self.logits(tokens[:, at : at + 1], position, cache).float()
            if not (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                raise CaptureFailed(f"fused kernels give other logits at token {at}")


def make_fused_decoder(
    loaded: LoadedModel, cache: Any, *, capacity: int, batch: int, prefill_chunk: int
) -> FusedDecoder:
    """A decoder over `cache`, whose kernels were compared with the model's own operations."""
    network = FusedNetwork(loaded.model, prefill_chunk, batch=batch, capacity=capacity)
    with torch.inference_mode():
        network.check(cache)
    return FusedDecoder(network, cache, capacity=capacity, batch=batch)


def _rewind(cache: Any) -> None:
    for layer in cache.layers:
        layer.rewind(0)


# -- one step -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What flows between launches, (batch, size) each."""

    hidden: Tensor
    query_key_value: Tensor
    attended: Tensor
    gated: Tensor
    logits: Tensor


class _Step:
    """The launches of one token, made once and queued again and again."""

    def __init__(
        self, model: Any, network: FusableNetwork, cache: Any, batch: int, capacity: int
    ) -> None:
        self._network = network
        self._buffers = _make_buffers(network, batch)
        self._attention = AttentionLaunches(model, network, cache, batch, capacity)
        self._batch = batch
        self._queues = list(self._launches())

    def run(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after the tokens (batch, 1); the buffer of every step."""
        network, buffers = self._network, self._buffers
        hidden = torch.embedding(network.embedding, input_ids[:, 0])
        if network.embedding_scale is not None:
            hidden = hidden * network.embedding_scale
        buffers.hidden.copy_(hidden)
        self._attention.position.copy_(positions[0])
        stream = torch.cuda.current_stream(hidden.device).cuda_stream
        for queue in self._queues:
            queue(stream)
        if network.logit_softcap:
            cap = network.logit_softcap
            return torch.tanh(buffers.logits / cap) * cap
        return buffers.logits

    def _launches(self) -> Iterator[Queue]:
        network, buffers = self._network, self._buffers
        for index, block in enumerate(network.blocks):
            yield from self._products(
                block.query_key_value, buffers.hidden, buffers.query_key_value, block.attention_norm
            )
            yield self._attention.launch(index, buffers.query_key_value, buffers.attended)
            yield self._added(block.output, buffers.attended)
            yield self._gated(block)
            yield self._added(block.down, buffers.gated)
        yield from self._products(
            (network.head,), buffers.hidden, buffers.logits, network.final_norm
        )

    def _products(
        self, layers: tuple[PackedRows, ...], x: Tensor, out: Tensor, norm: Norm | None
    ) -> Iterator[Queue]:
        """Layers of the same input, side by side in `out`: one launch if they are of one kind."""
        places, start = [], 0
        for layer in layers:
            places.append(out[:, start : start + layer.weight.rows])
            start += layer.weight.rows
        if len({layer.kind for layer in layers}) == 1:
            yield self._launch(layers, x, tuple(places), norm)
        else:
            for layer, place in zip(layers, places, strict=True):
                yield self._launch((layer,), x, (place,), norm)

    def _added(self, layer: PackedRows, x: Tensor) -> Queue:
        """A layer whose result is added to the hidden state."""
        return self._launch((layer,), x, (self._buffers.hidden,), None, epilogue="residual")

    def _gated(self, block: Block) -> Queue:
        out = (self._buffers.gated, self._buffers.gated)
        return self._launch(
            block.gate_up, self._buffers.hidden, out, block.mlp_norm, epilogue="gated"
        )

    def _launch(
        self,
        layers: tuple[PackedRows, ...],
        x: Tensor,
        outs: tuple[Tensor, ...],
        norm: Norm | None,
        *,
        epilogue: Epilogue = "bias",
    ) -> Queue:
        kind = replace(layers[0].kind, epilogue=epilogue, gate=self._network.gate)
        if norm is not None:
            kind = replace(kind, norm="rms_plus_one" if norm.plus_one else "rms")
        launch = LinearFew(
            kind,
            [layer.weight for layer in layers],
            max_tokens=self._batch,
            norm=None if norm is None else NormWeight(norm.weight.data_ptr(), norm.epsilon),
        )
        hidden = self._buffers.hidden
        tokens = Tokens(
            self._batch,
            x.data_ptr(),
            x.stride(0),
            tuple(out.data_ptr() for out in outs),
            tuple(out.stride(0) for out in outs),
            residual=hidden.data_ptr() if epilogue == "residual" else 0,
            residual_stride=hidden.stride(0),
        )
        return lambda stream: launch.queue(tokens, stream)


def _make_buffers(network: FusableNetwork, batch: int) -> _Buffers:
    first = network.blocks[0]

    def make(size: int) -> Tensor:
        return torch.empty(batch, size, dtype=network.dtype, device=network.embedding.device)

    return _Buffers(
        hidden=make(network.hidden_size),
        query_key_value=make(sum(layer.weight.rows for layer in first.query_key_value)),
        attended=make(network.num_heads * network.head_dim),
        gated=make(first.gate_up[0].weight.rows),
        logits=make(network.head.weight.rows),
    )
