"""The cache: what the layers keep of every token that attention still looks at, per runtime.

transformers' dynamic cache: full-attention layers keep every token, sliding ones the last
`window - 1` (the current token brings its own keys along). vLLM hands out pages of 16 tokens per
layer. What qtool's own runtime allocates for these tokens is in `own_runtime.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from qtool.architecture.cache import (
    AttentionCache,
    CacheLayer,
    CompressedCache,
    LatentCache,
    RecurrentState,
)
from qtool.planner.units import FLOAT32_BYTES

Runtime = Literal["qtool", "transformers", "vllm"]
KvDtype = Literal["auto", "bf16", "fp8", "int8"]

# How many layers of each kind; a model has one to four kinds.
CacheLayers = Mapping[CacheLayer, int]

# transformers' QuantizedCache with 8-bit integers (HQQ, Quanto): a 16-bit scale and zero point per
# group of values, and up to so many tokens that are not quantized yet.
QUANTIZED_GROUP: Final = 64
QUANTIZED_GROUP_BYTES: Final = 4
RESIDUAL_TOKENS: Final = 128

VLLM_BLOCK_TOKENS: Final = 16
# The tokens of one step that a sliding layer must hold beside its window (max_num_batched_tokens).
VLLM_BATCHED_TOKENS: Final = 8192


def kv_cache_bytes(
    layers: CacheLayers,
    *,
    context: int,
    batch: int,
    element_bytes: int,
    kv_dtype: KvDtype = "auto",
    runtime: Runtime = "qtool",
) -> int:
    """Bytes of `batch` sequences of `context` tokens.

    Args:
        element_bytes: of the dtype that the model computes in, which `auto` keeps.
    """
    return batch * sum(
        count * _layer_bytes(layer, context, element_bytes, kv_dtype, runtime)
        for layer, count in layers.items()
    )


def overhang_bytes(layers: CacheLayers, *, context: int, batch: int, element_bytes: int) -> int:
    """What sliding layers still hold right after a prompt of `context` tokens, beyond the cache.

    The cache keeps a view of the prompt's keys and values, so all of them stay until the next
    step copies the window out.
    """
    return batch * sum(
        count * (context - cached_tokens(layer, context)) * _token_elements(layer) * element_bytes
        for layer, count in layers.items()
        if isinstance(layer, AttentionCache)
    )


def cached_tokens(layer: CacheLayer, context: int) -> int:
    """How many of `context` tokens the layer keeps in transformers' cache."""
    if not isinstance(layer, AttentionCache) or layer.window is None:
        return context
    return min(context, max(layer.window - 1, 0))


def vllm_cache_tokens(layers: CacheLayers, *, pool_bytes: int, element_bytes: int) -> int:
    """The tokens that vLLM's log gives a cache of `pool_bytes`: whole blocks of all layers."""
    block_bytes = sum(
        count * VLLM_BLOCK_TOKENS * _token_elements(layer) * element_bytes
        for layer, count in layers.items()
    )
    return pool_bytes // block_bytes * VLLM_BLOCK_TOKENS


def dequantized_layer_bytes(
    layers: Iterable[CacheLayer], *, context: int, batch: int, element_bytes: int
) -> int:
    """What decoding with a quantized cache needs beside it: its largest layer at full width."""
    sizes = (
        kv_cache_bytes(Counter([layer]), context=context, batch=batch, element_bytes=element_bytes)
        for layer in layers
    )
    return max(sizes, default=0)


# -- one layer, one sequence ----------------------------------------------------------------------


def _layer_bytes(
    layer: CacheLayer, context: int, element_bytes: int, kv_dtype: KvDtype, runtime: Runtime
) -> int:
    if isinstance(layer, RecurrentState):
        return _state_bytes(layer, element_bytes)
    if isinstance(layer, CompressedCache):
        return _compressed_bytes(layer, context, element_bytes)
    keyed_layer_bytes = _vllm_layer_bytes if runtime == "vllm" else _dynamic_layer_bytes
    return keyed_layer_bytes(layer, context, element_bytes, kv_dtype)


def _dynamic_layer_bytes(
    layer: CacheLayer, context: int, element_bytes: int, kv_dtype: KvDtype
) -> int:
    tokens, elements = cached_tokens(layer, context), _token_elements(layer)
    if kv_dtype == "fp8":
        return tokens * elements
    if kv_dtype == "int8":
        groups = -(-tokens * elements // QUANTIZED_GROUP)
        residual = min(tokens, RESIDUAL_TOKENS) * elements * element_bytes
        return tokens * elements + groups * QUANTIZED_GROUP_BYTES + residual
    return tokens * elements * _element_bytes(kv_dtype, element_bytes)


def _vllm_layer_bytes(
    layer: CacheLayer, context: int, element_bytes: int, kv_dtype: KvDtype
) -> int:
    page_bytes = VLLM_BLOCK_TOKENS * _vllm_token_bytes(layer, element_bytes, kv_dtype)
    return _vllm_pages(layer, context) * page_bytes


def _vllm_pages(layer: CacheLayer, context: int) -> int:
    if not isinstance(layer, AttentionCache) or layer.window is None:
        return -(-context // VLLM_BLOCK_TOKENS)
    tokens = min(layer.window - 1 + VLLM_BATCHED_TOKENS, context)
    return -(-tokens // VLLM_BLOCK_TOKENS) + 1


def _vllm_token_bytes(layer: CacheLayer, element_bytes: int, kv_dtype: KvDtype) -> int:
    elements = _token_elements(layer)
    if kv_dtype not in ("fp8", "int8"):
        return elements * _element_bytes(kv_dtype, element_bytes)
    if kv_dtype == "int8" and isinstance(layer, AttentionCache):  # a scale per token and head
        return elements + 2 * layer.num_kv_heads * FLOAT32_BYTES
    return elements


def _element_bytes(kv_dtype: KvDtype, computed_bytes: int) -> int:
    return 2 if kv_dtype == "bf16" else computed_bytes


def _state_bytes(layer: RecurrentState, element_bytes: int) -> int:
    state_bytes = FLOAT32_BYTES if layer.state_dtype == "float32" else element_bytes
    return layer.conv_elements * element_bytes + layer.state_elements * state_bytes


def _compressed_bytes(layer: CompressedCache, context: int, element_bytes: int) -> int:
    exact = min(context, layer.window - 1) * layer.head_dim
    compressed = context // layer.rate * layer.entry_dim
    waiting = context % layer.rate * layer.waiting_dim
    num_bytes = (exact + compressed + waiting) * element_bytes
    if context >= layer.rate:
        num_bytes += layer.overlap_elements * (element_bytes + FLOAT32_BYTES)
    return num_bytes


def _token_elements(layer: CacheLayer) -> int:
    if isinstance(layer, AttentionCache):
        return layer.num_kv_heads * (layer.head_dim + layer.value_head_dim)
    if isinstance(layer, LatentCache):
        return layer.latent_dim + layer.rope_dim + layer.index_head_dim
    return 0
