"""Caches for keys and values: one that grows with the text, one of a fixed size for graphs.

Both are transformers' own, with the layers for attention replaced. Other kinds of layers (recurrent
states, indexers) stay transformers'.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from qtool.errors import Option, QtoolError

CAPACITY_STEP: Final = 64  # capacities are multiples of it
# Model types whose recurrent states go on with several tokens at once; others (Mamba 1) take a
# prompt whole, or silently start again. A test runs each of them.
CONTINUING_STATES: Final = frozenset(
    {
        "deepseek_v4",
        "mamba2",
        "nemotron_h",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
    }
)
# Left beside a cache for the activations of a step when it is said what would fit.
ACTIVATIONS_BYTES: Final = 256 << 20


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in buffers that double when full: a new token copies nothing of the old.

    `keys` and `values` are views of what is filled, (batch, heads, length, head_dim) each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first keys and values."""
        super().lazy_initialization(key_states, value_states)
        self._key_buffer = key_states[:, :, :0]
        self._value_buffer = value_states[:, :, :0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, n, head_dim); everything so far comes back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._length, self._length + key_states.shape[-2]
        if stop > self._key_buffer.shape[-2]:
            self._key_buffer = _enlarged(self._key_buffer, start, stop)
            self._value_buffer = _enlarged(self._value_buffer, start, stop)
        self._key_buffer[:, :, start:stop] = key_states
        self._value_buffer[:, :, start:stop] = value_states
        self._show(stop)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._length

    def rewind(self, length: int) -> None:
        """Forget what lies behind `length`."""
        if self.is_initialized:
            self._show(length)

    def _show(self, length: int) -> None:
        self._length = length
        self.keys = self._key_buffer[:, :, :length]
        self.values = self._value_buffer[:, :, :length]


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values of all tokens up to the capacity, where the next go is known to the device.

    Sliding windows have it too: their masks hide what lies outside. A ring would take less memory,
    but could not be rewound, and transformers counts its tokens on the host, where a graph cannot.
    """

    token_bytes = 0  # of one position of all sequences, once the first keys came

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; unlike the parent's nothing is marked for torch.compile, slow to import."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.token_bytes = _bytes_per_token(key_states) + _bytes_per_token(value_states)
        self.keys = _zeros_for(key_states, self.max_cache_len)
        self.values = _zeros_for(value_states, self.max_cache_len)
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True


def growing_cache(config: Any) -> Any:
    """An empty cache that grows with the text."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(it) is DynamicLayer else it for it in cache.layers]
    return cache


def fixed_cache(config: Any, capacity: int) -> Any | None:
    """An empty cache for `capacity` tokens that a graph can use; None if there is none such."""
    try:
        cache = StaticCache(config=config, max_cache_len=capacity)
    except (AttributeError, LookupError, TypeError):  # a kind of layer without a static form
        return None
    cache.layers = [
        FixedLayer(capacity) if type(it) in (StaticLayer, StaticSlidingWindowLayer) else it
        for it in cache.layers
    ]
    # What is left of transformers' own counts tokens on the host or keeps an indexer, whose static
    # form picks other tokens than its dynamic one.
    foreign = any(isinstance(it, StaticLayer) and type(it) is not FixedLayer for it in cache.layers)
    return None if foreign or not cache.is_compileable else cache


def can_rewind(cache: Any) -> bool:
    """Whether all layers can forget their last tokens."""
    return all(isinstance(it, GrowingLayer | FixedLayer) for it in _layers_that_hold(cache))


def takes_chunks(cache: Any, model_type: str) -> bool:
    """Whether the model goes on from what the cache holds with several tokens at once.

    Attention does. Of recurrent states only those do whose models are known to.
    """
    attention = GrowingLayer | FixedLayer | DynamicSlidingWindowLayer
    return model_type in CONTINUING_STATES or all(
        isinstance(it, attention) for it in _layers_that_hold(cache)
    )


def rewind(cache: Any, length: int) -> None:
    """Forget what lies behind `length` in every layer of a cache that can."""
    lengths = []
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.rewind(length)
        elif isinstance(layer, FixedLayer) and layer.is_initialized:
            lengths.append(layer.cumulative_length)
    if lengths:  # all at once: a launch for each layer would be longer than a short prompt's block
        torch._foreach_zero_(lengths)
        if length:
            torch._foreach_add_(lengths, length)


def cache_does_not_fit(cache: Any, capacity: int, device: torch.device) -> QtoolError | None:
    """The error for memory that ran out over a fixed cache; None if the cache is not to blame.

    Frees the layers and says how many tokens would go in, by the size of those that were reached.
    """
    layers = [it for it in cache.layers if isinstance(it, FixedLayer)]
    token_bytes = max((it.token_bytes for it in layers), default=0) * len(layers)
    for layer in layers:
        layer.keys = layer.values = torch.empty(0)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    room_bytes = max(free_bytes - ACTIVATIONS_BYTES, 0)
    if capacity * token_bytes <= room_bytes:
        return None
    fitting = room_bytes // max(token_bytes, 1) // CAPACITY_STEP * CAPACITY_STEP
    shorter: tuple[str | Option, ...] = ()
    if 0 < fitting < capacity:
        shorter = (Option("max_context", fitting), " would fit; so might ")
    return QtoolError(
        f"out of GPU memory: the cache for {capacity} tokens takes "
        f"{capacity * token_bytes / 2**30:.2f} GiB, {room_bytes / 2**30:.2f} GiB are free",
        kind="memory",
        hint=(
            *shorter,
            "fewer ",
            Option("max_new_tokens"),
            ", or a smaller ",
            Option("quant"),
            " of the model",
        ),
    )


def _layers_that_hold(cache: Any) -> list[Any]:
    """All layers but the empty ones of models that share keys and values between layers."""
    kinds = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return [it for it in cache.layers if isinstance(it, kinds)]


def _bytes_per_token(states: Tensor) -> int:
    batch, heads, _, head_dim = states.shape
    return batch * heads * head_dim * states.element_size()


def _enlarged(buffer: Tensor, filled: int, needed: int) -> Tensor:
    """A buffer at least twice as long with the same `filled` tokens."""
    batch, heads, length, head_dim = buffer.shape
    larger = buffer.new_empty(batch, heads, max(2 * length, needed, CAPACITY_STEP), head_dim)
    larger[:, :, :filled] = buffer[:, :, :filled]
    return larger


def _zeros_for(states: Tensor, capacity: int) -> Tensor:
    """Zeros (batch, heads, capacity, head_dim): what is not filled must not be NaN, since masked
    positions still meet a weight of 0."""
    batch, heads, _, head_dim = states.shape
    return states.new_zeros(batch, heads, capacity, head_dim)
