"""Caches: growing, fixed, rewound; which models have them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qtool.runtime.decoders.caches import (
    CAPACITY_STEP,
    FixedLayer,
    GrowingLayer,
    can_rewind,
    fixed_cache,
    growing_cache,
    rewind,
    takes_chunks,
)
from tests.runtime.decoders.tiny import tiny_model


def states(num_tokens: int, first: float = 0.0) -> torch.Tensor:
    """Distinct values (2, 3, num_tokens, 4)."""
    values = torch.arange(2 * 3 * num_tokens * 4, dtype=torch.float32) + first
    return values.view(2, 3, num_tokens, 4)


def test_a_growing_layer_gives_back_what_went_in() -> None:
    layer = GrowingLayer()
    parts = [states(n, first=1000.0 * n) for n in (5, 1, CAPACITY_STEP, 1, 3 * CAPACITY_STEP)]
    for count in range(1, len(parts) + 1):
        keys, values = layer.update(parts[count - 1], -parts[count - 1])
        assert torch.equal(keys, torch.cat(parts[:count], dim=2))
        assert torch.equal(values, -keys)
        assert layer.get_seq_length() == keys.shape[2]


def test_a_growing_layer_copies_nothing_for_most_tokens() -> None:
    layer = GrowingLayer()
    places = set()
    for _ in range(CAPACITY_STEP * 8):
        keys, _ = layer.update(states(1), states(1))
        places.add(keys.data_ptr())
    assert len(places) <= 4


def test_a_rewound_layer_forgets() -> None:
    layer = GrowingLayer()
    layer.rewind(0)  # nothing there yet
    layer.update(states(6), states(6))
    layer.rewind(2)
    assert layer.get_seq_length() == 2
    keys, _ = layer.update(states(1, first=500.0), states(1))
    assert torch.equal(keys, torch.cat([states(6)[:, :, :2], states(1, first=500.0)], dim=2))


def test_a_fixed_layer_counts_on_the_device() -> None:
    layer = FixedLayer(16)
    layer.update(states(6), states(6))
    assert layer.keys.shape == (2, 3, 16, 4)
    assert int(layer.cumulative_length) == 6
    rewind(SimpleNamespace(layers=[layer]), 2)
    keys, _ = layer.update(states(1, first=500.0), states(1))
    assert torch.equal(keys[:, :, 2:3], states(1, first=500.0))
    assert int(layer.cumulative_length) == 3


@pytest.mark.parametrize(
    ("model_type", "rewinds_growing", "rewinds_fixed", "chunks"),
    [
        ("llama", True, True, True),
        ("gemma3_text", False, True, True),
        ("gpt_oss", False, True, True),
        ("mamba2", False, False, True),
        ("jamba", False, False, False),
        ("qwen3_next", False, False, True),
    ],
)
def test_what_caches_can_do(
    model_type: str, rewinds_growing: bool, rewinds_fixed: bool, chunks: bool
) -> None:
    config = tiny_model(model_type).config
    growing, fixed = growing_cache(config), fixed_cache(config, 64)
    assert fixed is not None
    assert can_rewind(growing) == rewinds_growing
    assert can_rewind(fixed) == rewinds_fixed
    assert takes_chunks(growing, config.model_type) == chunks
    assert takes_chunks(fixed, config.model_type) == chunks


@pytest.mark.parametrize("model_type", ["deepseek_v4", "deepseek_v32", "glm_moe_dsa"])
def test_compressed_keys_and_indexers_have_no_fixed_cache(model_type: str) -> None:
    assert fixed_cache(tiny_model(model_type).config, 64) is None


def test_sliding_windows_are_kept_whole_in_a_fixed_cache() -> None:
    cache = fixed_cache(tiny_model("gemma2").config, 128)
    assert [type(layer) for layer in cache.layers] == [FixedLayer] * 3
    assert not any(cache.is_sliding)


def test_a_cache_is_rewound_as_a_whole() -> None:
    model = tiny_model("llama")
    cache = growing_cache(model.config)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    rewind(cache, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [1, 1, 1]


@pytest.mark.parametrize("length", [0, 2])
def test_a_fixed_cache_is_rewound_as_a_whole(length: int) -> None:
    model = tiny_model("llama")
    cache = fixed_cache(model.config, 128)
    rewind(cache, length)  # nothing there yet
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        rewind(cache, length)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [length] * 3
