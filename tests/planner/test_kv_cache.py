"""The cache against published sizes, and how it grows."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.architecture import (
    AttentionCache,
    LatentCache,
    RecurrentState,
    build_architecture,
)
from qtool.planner.kv_cache import (
    cached_tokens,
    kv_cache_bytes,
    overhang_bytes,
    vllm_cache_tokens,
)

GIB = 1 << 30
GQA = AttentionCache(num_kv_heads=8, head_dim=128, value_head_dim=128)
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


@pytest.mark.parametrize(
    ("layers", "gib", "tokens"),
    [  # vLLM's log lines for Llama-3.1-8B and gpt-oss-120b, whose layers it counts all in full
        (LLAMA_8B, 19.28, 157_936),
        (LLAMA_8B, 3.78, 30_960),
        (Counter({AttentionCache(8, 64, 64): 36}), 5.38, 78_384),
    ],
)
def test_tokens_that_vllm_reports(layers, gib, tokens):
    """To the block; the log gives the memory to two digits."""

    def tokens_in(num_bytes):
        return vllm_cache_tokens(layers, pool_bytes=int(num_bytes), element_bytes=2)

    assert tokens_in((gib - 0.005) * GIB) <= tokens <= tokens_in((gib + 0.005) * GIB)
    exact_bytes = kv_cache_bytes(layers, context=tokens, batch=1, element_bytes=2)
    assert tokens_in(exact_bytes) == tokens == tokens_in(exact_bytes - 1) + 16
    assert tokens % 16 == 0


def test_bytes_per_token_that_are_published():
    gpt_oss = Counter({AttentionCache(8, 64, 64): 36})
    assert kv_cache_bytes(LLAMA_8B, context=1, batch=1, element_bytes=2) == 131_072
    assert kv_cache_bytes(gpt_oss, context=1, batch=1, element_bytes=2) == 73_728


@pytest.mark.parametrize(
    ("name", "context", "gib"),
    [
        ("deepseek-ai--DeepSeek-V3", 131_072, 70_272 * 131_072 / GIB),  # the latent, 61 layers
        ("moonshotai--Kimi-K2-Instruct", 131_072, 70_272 * 131_072 / GIB),
        ("mirror--medgemma-27b-it", 131_072, 10.4),  # 62.0 if every layer kept all
        ("Qwen--Qwen3-Next-80B-A3B", 262_144, 6.0),  # 24.0
    ],
)
def test_caches_that_are_often_overestimated(test_data, name, context, gib):
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    layers = Counter(build_architecture(config).cache_layers)
    found = kv_cache_bytes(layers, context=context, batch=1, element_bytes=2) / GIB
    assert found == pytest.approx(gib, rel=0.013)


def test_vllm_hands_out_whole_pages():
    sizes = {"batch": 2, "element_bytes": 2, "runtime": "vllm"}
    page = 16 * 8 * 256 * 2
    for context, pages in ((1, 1), (16, 1), (17, 2), (4096, 256)):
        assert kv_cache_bytes(LLAMA_8B, context=context, **sizes) == 2 * 32 * pages * page
    sliding = Counter({AttentionCache(8, 128, 128, window=1024): 1})
    assert kv_cache_bytes(sliding, context=1000, **sizes) == 2 * (63 + 1) * page
    whole_step = -(-(1023 + 8192) // 16) + 1
    assert kv_cache_bytes(sliding, context=100_000, **sizes) == 2 * whole_step * page


def test_quantized_caches():
    sizes = {"context": 1000, "batch": 1, "element_bytes": 2}
    values = 32 * 8 * 256 * 1000
    assert kv_cache_bytes(LLAMA_8B, **sizes, kv_dtype="fp8") == values
    residual = 32 * 8 * 256 * 128 * 2
    found = kv_cache_bytes(LLAMA_8B, **sizes, kv_dtype="int8", runtime="transformers")
    assert found == values + values // 64 * 4 + residual
    paged = kv_cache_bytes(LLAMA_8B, **sizes, kv_dtype="int8", runtime="vllm")
    assert paged == 32 * 63 * 16 * (8 * 256 + 2 * 8 * 4)
    assert kv_cache_bytes(LLAMA_8B, **sizes, kv_dtype="bf16") == 2 * values
    wide = {**sizes, "element_bytes": 4}
    assert kv_cache_bytes(LLAMA_8B, **wide) == 4 * values
    assert kv_cache_bytes(LLAMA_8B, **wide, kv_dtype="bf16") == 2 * values


def test_recurrent_states_and_latents():
    layers = Counter({RecurrentState(10, 100): 2, RecurrentState(10, 100, None): 1})
    for context in (1, 5000):
        sizes = {"context": context, "batch": 3, "element_bytes": 2}
        assert kv_cache_bytes(layers, **sizes) == 3 * (2 * (20 + 400) + (20 + 200))
    latent = Counter({LatentCache(512, 64, index_head_dim=128): 1})
    assert kv_cache_bytes(latent, context=10, batch=1, element_bytes=2) == 10 * 704 * 2


def test_half_of_the_layers_sliding_halves_the_cache():
    """gpt-oss-20b with 8,096 tokens: 192.8 MiB; 379.5 if every layer kept all."""
    full, sliding = AttentionCache(8, 64, 64), AttentionCache(8, 64, 64, window=129)
    mib = kv_cache_bytes(
        Counter({full: 12, sliding: 12}), context=8096, batch=1, element_bytes=2
    ) / (1 << 20)
    assert mib == pytest.approx(192.8, abs=0.1)


def test_a_window_keeps_one_token_less_than_it_spans():
    """The current token's keys come with it."""
    layer = AttentionCache(1, 8, 8, window=4)
    assert [cached_tokens(layer, context) for context in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert cached_tokens(AttentionCache(1, 8, 8), 9) == 9
    assert cached_tokens(AttentionCache(1, 8, 8, window=1), 9) == 0


def test_keys_and_values_may_differ_in_width():
    layers = Counter({AttentionCache(4, 192, 128): 2})
    assert kv_cache_bytes(layers, context=10, batch=3, element_bytes=2) == 2 * 4 * 320 * 10 * 3 * 2


LAYERS = st.builds(
    AttentionCache,
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
        no_windows[AttentionCache(layer.num_kv_heads, layer.head_dim, layer.value_head_dim)] += (
            count
        )
    whole = kv_cache_bytes(no_windows, **sizes)
    assert kv_cache_bytes(layers, **sizes) + overhang_bytes(layers, **sizes) == whole
