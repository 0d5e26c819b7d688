"""The KV cache: keys and values of every token that attention still looks at.

Follows transformers' dynamic cache, which qtool's runtime fills: full-attention layers keep every
token, sliding ones the last `window - 1` (the current token brings its own keys along).
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.architecture import CacheLayer

# How many layers of each kind; a model has one or two kinds.
CacheLayers = Mapping[CacheLayer, int]


def kv_cache_bytes(layers: CacheLayers, *, context: int, batch: int, element_bytes: int) -> int:
    """Bytes of `batch` sequences of `context` tokens."""
    return batch * sum(
        count * cached_tokens(layer, context) * _token_elements(layer) * element_bytes
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
    )


def cached_tokens(layer: CacheLayer, context: int) -> int:
    """How many of `context` tokens the layer keeps."""
    return context if layer.window is None else min(context, max(layer.window - 1, 0))


def _token_elements(layer: CacheLayer) -> int:
    return layer.num_kv_heads * (layer.head_dim + layer.value_head_dim)
