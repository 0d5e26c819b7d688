"""The common decoder block on our own kernels: five launches a block and token, in one CUDA graph.

The cache is the one of the graph path. A step of one token is the embedding, then per block (norm,
query, key and value), (rotary embedding, cache update, attention), (output, residual), (norm, gate
and up, activation), (down, residual), and at last (norm, head). A norm of what output or down adds
needs all of it, and takes a launch of its own behind; an adapter takes a small one before its
product. Each launch begins to load its weights while the one before still works. Before use all is
compared with transformers' operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from cupy_kernels.argmax_rows import argmax_rows, workspace_bytes
from cupy_kernels.linear_few import (
    MAX_TOKENS,
    OLDEST_COMPUTE_CAPABILITY,
    Epilogue,
    LinearFew,
    NormWeight,
    Tokens,
)
from cupy_kernels.prompt_rows import NormRows
from qtool.runtime.decoders.blocks import (
    Block,
    FusableNetwork,
    Norm,
    NotFusable,
    PackedRows,
    describe_network,
)
from qtool.runtime.decoders.caches import CAPACITY_STEP, cache_does_not_fit, fixed_cache, rewind
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.fused_adapters import (
    AdapterGroup,
    AdapterLaunches,
    BlockAdapters,
    adapters_of,
)
from qtool.runtime.decoders.fused_attention import AttentionLaunches, attention_shape, check_rotary
from qtool.runtime.decoders.fused_prompt import FusedPrompt, PromptLaunches, check_windows
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.network import Network, on_device
from qtool.runtime.decoders.protocol import Path, Sampling
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.loading import LoadedModel
from qtool.runtime.products import MAX_PACKED_TOKENS

REASON: Final = "fused kernels, one CUDA graph per token"
# Of the largest logit: how far fused logits may be from those of transformers' own operations.
TOLERANCE: Final = 0.05
NUM_COMPARED: Final = 4

Queue = Callable[[int], None]  # queues a launch on a stream


def why_not_fused(loaded: LoadedModel, batch: int) -> str | None:
    """What speaks against the fused path on the model's GPU; None if nothing does."""
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
    path_reason: str = REASON

    def close(self) -> None:
        """See `GraphDecoder.close`."""
        super().close()
        cast(FusedNetwork, self._network).leave_cache()

    def _choose(self, logits: Tensor, sampling: Sampling) -> Tensor:
        network = cast(FusedNetwork, self._network)
        if sampling.temperature == 0 and network.has_own_choice:
            return network.most_likely()
        return super()._choose(logits, sampling)


class FusedNetwork(Network):
    """A model whose blocks run on our kernels, over a cache of `FixedLayer`s.

    Attributes:
        prompt_reason: why prompts go through the model's own operations; empty where they do not.
    """

    def __init__(self, model: Any, prefill_chunk: int, *, batch: int, capacity: int) -> None:
        super().__init__(model, prefill_chunk)
        self._chunk = prefill_chunk
        self._batch, self._capacity = batch, capacity
        self._network = describe_network(model)
        self._step: _Step | None = None
        self._prompt: FusedPrompt | None = None
        self.prompt_reason = ""

    def prepare(self, cache: Any) -> None:
        """Make launches for a cache, and compare what they compute with the model's own operations.

        Leaves the cache empty.

        Raises:
            CaptureFailed: the kernels do not take such layers on this GPU, or the logits of a step
                differ by more than rounding does.
        """
        with on_device(self.device):
            self._prepare(cache)

    def _prepare(self, cache: Any) -> None:
        tokens = torch.arange(1, NUM_COMPARED + 1, device=self.device).expand(self._batch, -1)
        expected = self._own_logits(tokens)
        self._make_room(cache)
        adapters = adapters_of(self._network)
        try:
            self._step = _Step(
                self.model, self._network, adapters, cache, self._batch, self._capacity
            )
        except ValueError as error:  # such as too little shared memory for so many tokens
            raise CaptureFailed(str(error)) from error
        own = _Own(expected, lambda: self._nudged_logits(tokens))
        self._check_steps(tokens, own, cache)
        try:
            check_windows(self._network, self._capacity)
            launches = PromptLaunches(self._network, self._step.attention)
            self._prompt = FusedPrompt(
                self._network, launches, cache, self._capacity, adapters=adapters
            )
            self._check_prompt(tokens, own)
        except torch.OutOfMemoryError:
            raise
        except (NotFusable, RuntimeError) as reason:
            self._prompt, self.prompt_reason = None, str(reason).partition("\n")[0]
        rewind(cache, 0)

    def leave_cache(self) -> None:
        """Drop what refers to the cache that it was prepared for."""
        self._step = self._prompt = None

    @property
    def has_own_choice(self) -> bool:
        """Whether the last step's logits are where `most_likely` looks."""
        return self._step is not None and not self._network.logit_softcap

    def most_likely(self) -> Tensor:
        """The most likely tokens after the last step, int64 (batch,)."""
        assert self._step is not None
        return self._step.most_likely()

    def logits(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """See `Network.logits`."""
        if input_ids.shape[1] > 1 or self._step is None:
            return super().logits(input_ids, positions, cache)
        return self._step.run(input_ids, positions)

    def prefill(self, input_ids: Tensor, start: int, cache: Any, *, in_chunks: bool) -> Tensor:
        """See `Network.prefill`; a single token is a step like any other."""
        if self._prompt is None or self._step is None or input_ids.shape[1] == 1:
            return super().prefill(input_ids, start, cache, in_chunks=in_chunks)
        return self._run_prompt(input_ids.to(self.device), start, self._chunk)

    def _run_prompt(self, input_ids: Tensor, start: int, chunk: int) -> Tensor:
        assert self._prompt is not None and self._step is not None
        for first in range(0, input_ids.shape[1], chunk):
            hidden = self._prompt.run(input_ids[:, first : first + chunk], start + first)
        return self._step.head(hidden)

    # -- comparing --------------------------------------------------------------------------------

    def _own_logits(self, tokens: Tensor) -> list[Tensor]:
        """float32 (batch, vocabulary) of the model's own operations after each of `tokens`.

        Over a small cache: those operations copy all of it for each query head.
        """
        cache = fixed_cache(self.model.config, CAPACITY_STEP)
        positions = torch.arange(tokens.shape[1], device=self.device).expand(self._batch, -1)
        return list(self.all_logits(tokens, positions, cache).float().unbind(1))

    def _nudged_logits(self, tokens: Tensor) -> list[Tensor]:
        """The same where each embedding is off by as much as rounding it."""
        noise = torch.Generator(self.device).manual_seed(0)
        thread = threading.get_ident()

        def nudge(module: Any, inputs: Any, output: Tensor) -> Tensor:
            if threading.get_ident() != thread:  # others may run the model meanwhile
                return output
            sign = torch.empty_like(output).uniform_(-1, 1, generator=noise).sign()
            return output * (1 + torch.finfo(output.dtype).eps * sign)

        hook = self.model.get_input_embeddings().register_forward_hook(nudge)
        try:
            return self._own_logits(tokens)
        finally:
            hook.remove()

    def _make_room(self, cache: Any) -> None:
        """Allocate keys and values."""
        network = self._network
        shape = (self._batch, network.num_kv_heads, 1, network.head_dim)
        like = torch.empty(shape, dtype=network.dtype, device=self.device)
        for layer in cache.layers:
            layer.lazy_initialization(like, like)

    def _check_steps(self, tokens: Tensor, own: _Own, cache: Any) -> None:
        assert self._step is not None
        rewind(cache, 0)
        super().prefill(tokens[:, :1], 0, cache, in_chunks=False)
        for at in range(1, tokens.shape[1]):
            position = torch.full((self._batch, 1), at, device=self.device)
            found = self._step.run(tokens[:, at : at + 1], position)
            if not own.may_be(found, at):
                raise CaptureFailed(f"fused kernels give other logits at token {at}")
        if own.last_near is None:
            raise CaptureFailed("its logits hang on rounding, so kernels cannot be checked")

    def _check_prompt(self, tokens: Tensor, own: _Own) -> None:
        """Up to a token that tells: in one chunk through dequantized layers, in two through those
        for few tokens, and through products of many, which are not used where they differ."""
        assert self._prompt is not None and own.last_near is not None
        prompt, count = self._prompt, own.last_near + 1

        def gives_the_same(chunk: int, few: int, many: bool) -> bool:
            prompt.max_packed_tokens, prompt.multiplies_many = few, many
            found = self._run_prompt(tokens[:, :count], 0, chunk)
            return own.differs_by_rounding(found, count - 1)

        ways = ((count, 0), (max(count - 2, 1), MAX_PACKED_TOKENS))
        if not all(gives_the_same(chunk, few, many=False) for chunk, few in ways):
            raise NotFusable("a prompt gives other logits there")
        takes_many = prompt.can_multiply_many() and gives_the_same(count, 0, many=True)
        prompt.max_packed_tokens = MAX_PACKED_TOKENS
        prompt.multiplies_many = None if takes_many else False


@dataclass(slots=True)
class _Own:
    """The logits of the model's own operations after each of some tokens, and what may be them.

    After some tokens they hang on the last bit of an embedding, with random weights more often than
    with trained ones: the model itself would give others in float32. Such a token tells nothing.

    Args:
        logits: float32 (batch, vocabulary) each.
        make_nudged: makes the same where embeddings are off by as much as rounding them.
        last_near: the last token whose logits were found again.
    """

    logits: list[Tensor]
    make_nudged: Callable[[], list[Tensor]]
    last_near: int | None = None
    _nudged: list[Tensor] | None = field(default=None, init=False)

    def may_be(self, found: Tensor, at: int) -> bool:
        """Whether nothing is wrong with logits found after token `at`."""
        if _are_near(found, self.logits[at]):
            self.last_near = at
            return True
        return not _are_near(self._nudged_after(at), self.logits[at])

    def differs_by_rounding(self, found: Tensor, at: int) -> bool:
        """Whether logits that were computed in another order, of weights that may be rounded, are
        near, or as near as those of nudged embeddings.
        """
        own = self.logits[at]
        difference = _difference(found, own)
        return difference <= TOLERANCE or difference <= _difference(self._nudged_after(at), own)

    def _nudged_after(self, at: int) -> Tensor:
        if self._nudged is None:
            self._nudged = self.make_nudged()
        return self._nudged[at]


def make_fused_decoder(
    loaded: LoadedModel, cache: Any, *, capacity: int, batch: int, prefill_chunk: int
) -> FusedDecoder:
    """A decoder over `cache`, whose kernels were compared with the model's own operations.

    Raises:
        CaptureFailed: they compute something else, or cannot be recorded.
        QtoolError: memory, if the cache does not fit.
    """
    network = FusedNetwork(loaded.model, prefill_chunk, batch=batch, capacity=capacity)
    try:
        with torch.inference_mode():
            network.prepare(cache)
    except torch.OutOfMemoryError as error:
        raise cache_does_not_fit(cache, capacity, network.device) or error from error
    decoder = FusedDecoder(network, cache, capacity=capacity, batch=batch)
    if network.prompt_reason:
        decoder.path_reason = f"{REASON}; prompts on the model's own: {network.prompt_reason}"
    return decoder


def _are_near(found: Tensor, expected: Tensor) -> bool:
    return _difference(found, expected) <= TOLERANCE  # not >: a NaN is a difference too


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest, over the largest logit."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


# -- one step -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What flows between launches, (batch, size) each.

    Args:
        added: what is normed before it is added to `hidden`; None where nothing is.
    """

    hidden: Tensor
    query_key_value: Tensor
    attended: Tensor
    gated: Tensor
    added: Tensor | None
    logits: Tensor


class _Step:
    """The launches of one token, made once and queued again and again."""

    def __init__(
        self,
        model: Any,
        network: FusableNetwork,
        adapters: Sequence[BlockAdapters],
        cache: Any,
        batch: int,
        capacity: int,
    ) -> None:
        self._network = network
        self._adapters = adapters
        self._inner = AdapterLaunches(adapters, batch, network.embedding.device)
        self._buffers = _make_buffers(network, batch)
        self.attention = AttentionLaunches(model, network, cache, batch, capacity)
        self._batch = batch
        self._queues = list(self._launches())
        logits = self._buffers.logits
        self._tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
        self._workspace = torch.zeros(
            workspace_bytes(batch), dtype=torch.uint8, device=logits.device
        )
        self._argmax = argmax_rows(
            logits.data_ptr(),
            KERNEL_DTYPES[network.dtype],
            *logits.shape,
            workspace=self._workspace.data_ptr(),
            out=self._tokens.data_ptr(),
        )

    def run(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after the tokens (batch, 1); the buffer of every step."""
        network, buffers = self._network, self._buffers
        hidden = torch.embedding(network.embedding, input_ids[:, 0])
        if network.embedding_scale is not None:
            hidden = hidden * network.embedding_scale
        buffers.hidden.copy_(hidden)
        self.attention.position.copy_(positions[0])
        self._inner.begin()
        self._queue(self._queues)
        return self._capped()

    def most_likely(self) -> Tensor:
        """int64 (batch,): the largest logits of the last step."""
        self._queue([self._argmax])
        return self._tokens

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (batch, vocabulary) of hidden states (batch, hidden) before the final norm."""
        self._buffers.hidden.copy_(hidden)
        self._queue(self._queues[-1:])
        return self._capped().clone()

    def _queue(self, queues: Sequence[Queue]) -> None:
        stream = torch.cuda.current_stream(self._buffers.hidden.device).cuda_stream
        for queue in queues:
            queue(stream)

    def _capped(self) -> Tensor:
        cap = self._network.logit_softcap
        logits = self._buffers.logits
        return torch.tanh(logits / cap) * cap if cap else logits

    def _launches(self) -> Iterator[Queue]:
        network, buffers = self._network, self._buffers
        for index, (block, adapters) in enumerate(zip(network.blocks, self._adapters, strict=True)):
            yield from self._products(
                block.query_key_value,
                buffers.hidden,
                buffers.query_key_value,
                block.attention_norm,
                adapters.query_key_value,
            )
            yield self.attention.launch(index, buffers.query_key_value, buffers.attended)
            yield from self._added(
                block.output, buffers.attended, block.output_norm, adapters.output
            )
            yield from self._gated(block, adapters.gate_up)
            yield from self._added(block.down, buffers.gated, block.down_norm, adapters.down)
        yield from self._products(
            (network.head,), buffers.hidden, buffers.logits, network.final_norm, None
        )

    def _products(
        self,
        layers: tuple[PackedRows, ...],
        x: Tensor,
        out: Tensor,
        norm: Norm | None,
        adapters: AdapterGroup | None,
    ) -> Iterator[Queue]:
        """Layers of the same input and kind, side by side in `out`."""
        places, start = [], 0
        for layer in layers:
            places.append(out[:, start : start + layer.weight.rows])
            start += layer.weight.rows
        yield from self._launch(layers, x, tuple(places), norm, adapters)

    def _added(
        self, layer: PackedRows, x: Tensor, norm: Norm | None, adapters: AdapterGroup | None
    ) -> Iterator[Queue]:
        """A layer whose result, or the norm of it, is added to the hidden state."""
        if norm is None:
            hidden = self._buffers.hidden
            yield from self._launch((layer,), x, (hidden,), None, adapters, epilogue="residual")
            return
        added = self._buffers.added
        assert added is not None
        yield from self._launch((layer,), x, (added,), None, adapters)
        yield self._norm_added(norm, added)

    def _norm_added(self, norm: Norm, x: Tensor) -> Queue:
        dtype = KERNEL_DTYPES[self._network.dtype]
        launch = NormRows(x.shape[1], dtype, norm.kind, added=True)
        weight, address = NormWeight(norm.weight.data_ptr(), norm.epsilon), x.data_ptr()
        batch, hidden = self._batch, self._buffers.hidden.data_ptr()
        # Without self, which holds this: a cycle would keep the cache until it is collected.
        return lambda stream: launch.queue(batch, weight, address, hidden, stream)

    def _gated(self, block: Block, adapters: AdapterGroup | None) -> Iterator[Queue]:
        buffers = self._buffers
        outs = (buffers.gated, buffers.gated)
        yield from self._launch(
            block.gate_up, buffers.hidden, outs, block.mlp_norm, adapters, epilogue="gated"
        )

    def _launch(
        self,
        layers: tuple[PackedRows, ...],
        x: Tensor,
        outs: tuple[Tensor, ...],
        norm: Norm | None,
        adapters: AdapterGroup | None,
        *,
        epilogue: Epilogue = "bias",
    ) -> Iterator[Queue]:
        kind = replace(layers[0].kind, epilogue=epilogue, gate=self._network.gate)
        if norm is not None:
            kind = replace(kind, norm=norm.kind)
        norm_weight = None if norm is None else NormWeight(norm.weight.data_ptr(), norm.epsilon)
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
        if adapters is not None:
            kind = replace(kind, adapted=True)
            inner, tokens = self._inner.launch(adapters, kind, tokens, norm_weight)
            yield inner
        launch = LinearFew(
            kind,
            [layer.weight for layer in layers],
            max_tokens=self._batch,
            norm=norm_weight,
            adapters=() if adapters is None else adapters.weights,
        )
        yield lambda stream: launch.queue(tokens, stream)


def _make_buffers(network: FusableNetwork, batch: int) -> _Buffers:
    first = network.blocks[0]
    has_added_norms = any(block.has_added_norms for block in network.blocks)

    def make(size: int) -> Tensor:
        return torch.empty(batch, size, dtype=network.dtype, device=network.embedding.device)

    return _Buffers(
        hidden=make(network.hidden_size),
        query_key_value=make(sum(layer.weight.rows for layer in first.query_key_value)),
        attended=make(network.num_heads * network.head_dim),
        gated=make(first.gate_up[0].weight.rows),
        added=make(network.hidden_size) if has_added_norms else None,
        logits=make(network.head.weight.rows),
    )
