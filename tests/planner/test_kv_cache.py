"""The cache against published sizes, and how it grows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.architecture import CacheLayer
from qtool.planner.kv_cache import cached_tokens, kv_cache_bytes, overhang_bytes

GIB = 1 << 30
GQA = CacheLayer(num_kv_heads=8, head_dim=128, value_head_dim=128)
LLAMA_8B, LLAMA_70B = Counter({GQA: 32}), Counter({GQA: 80})


@pytest.mark.parametrize(
    ("layers", "context", "gib"),
    [  # Hugging Face's table for Llama 3.1, 16-bit cache
        (LLAMA_8B, 1024, 0.125),
        (LLAMA_8B, 16_000, 1.95),
        (LLAMA_8B, 128_000, 15.62),
        (LLAMA_70B, 1024, 0.313),
        (LLAMA_70B, 16_000, 4.88),
        (LLAMA_70B, 128_000, 39.06),
    ],
)
def test_published_sizes_of_llama(layers, context, gib):
    found = kv_cache_bytes(layers, context=context, batch=1, element_bytes=2)
    assert found / GIB == pytest.approx(gib, abs=0.006)


def test_bytes_per_token_that_vllm_reports():
    assert kv_cache_bytes(LLAMA_8B, context=1, batch=1, element_bytes=2) == 131_072
    # gpt-oss-120b: 36 layers, all counted in full
    layers = Counter({CacheLayer(8, 64, 64): 36})
    assert kv_cache_bytes(layers, context=1, batch=1, element_bytes=2) == 73_728


def test_half_of_the_layers_sliding_halves_the_cache():
    """gpt-oss-20b with 8,096 tokens: 192.8 MiB; 379.5 if every layer kept all."""
    full, sliding = CacheLayer(8, 64, 64), CacheLayer(8, 64, 64, window=129)
    mib = kv_cache_bytes(
        Counter({full: 12, sliding: 12}), context=8096, batch=1, element_bytes=2
    ) / (1 << 20)
    assert mib == pytest.approx(192.8, abs=0.1)


def test_a_window_keeps_one_token_less_than_it_spans():
    """The current token's keys come with it."""
    layer = CacheLayer(1, 8, 8, window=4)
    assert [cached_tokens(layer, context) for context in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert cached_tokens(CacheLayer(1, 8, 8), 9) == 9
    assert cached_tokens(CacheLayer(1, 8, 8, window=1), 9) == 0


def test_keys_and_values_may_differ_in_width():
    layers = Counter({CacheLayer(4, 192, 128): 2})
    assert kv_cache_bytes(layers, context=10, batch=3, element_bytes=2) == 2 * 4 * 320 * 10 * 3 * 2


LAYERS = st.builds(
    CacheLayer,
    num_kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 512),
    value_head_dim=st.integers(1, 512),
    window=st.none() | st.integers(1, 10_000),
)
CACHES = st.dictionaries(LAYERS, st.integers(1, 200), min_size=1, max_size=3)
CONTEXTS, BATCHES = st.integers(1, 1 << 22), st.integers(1, 1 << 12)


@given(CACHES, CONTEXTS, BATCHES)
def test_cache_grows_with_context_and_in_step_with_batch_and_width(layers, context, batch):
    one = kv_cache_bytes(layers, context=context, batch=batch, element_bytes=2)
    assert one <= kv_cache_bytes(layers, context=context + 1, batch=batch, element_bytes=2)
    assert 2 * one == kv_cache_bytes(layers, context=context, batch=2 * batch, element_bytes=2)
    assert 2 * one == kv_cache_bytes(layers, context=context, batch=batch, element_bytes=4)


@given(CACHES, CONTEXTS, BATCHES)
def test_cache_and_overhang_are_the_whole_prompt(layers, context, batch):
    sizes = {"context": context, "batch": batch, "element_bytes": 2}
    no_windows = Counter()
    for layer, count in layers.items():
        no_windows[CacheLayer(layer.num_kv_heads, layer.head_dim, layer.value_head_dim)] += count
    whole = kv_cache_bytes(no_windows, **sizes)
    assert kv_cache_bytes(layers, **sizes) + overhang_bytes(layers, **sizes) == whole
