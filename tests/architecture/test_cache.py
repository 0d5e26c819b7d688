"""The bytes that a running model's cache holds are those that its `cache_layers` say."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

import pytest
import torch

from qtool.architecture import (
    AttentionCache,
    CacheLayer,
    CompressedCache,
    LatentCache,
    RecurrentState,
    build_architecture,
)
from tests.architecture import oracle
from tests.architecture.families import TINY

BF16, FLOAT32 = 2, 4
ARCHITECTURES = {
    model_type: build_architecture({"model_type": model_type, **TINY[model_type]})
    for model_type in sorted(TINY)
}
# Beyond keys and values per head, which test_families looks at.
OTHER_CACHES = [
    model_type
    for model_type, ours in ARCHITECTURES.items()
    if not all(isinstance(layer, AttentionCache) for layer in ours.cache_layers)
]


def expected_bytes(layer: CacheLayer, context: int) -> int:
    """What one layer keeps of `context` tokens in a bfloat16 model, one sequence."""
    match layer:
        case AttentionCache():
            tokens = context if layer.window is None else min(context, layer.window - 1)
            return tokens * layer.num_kv_heads * (layer.head_dim + layer.value_head_dim) * BF16
        case LatentCache():
            return context * (layer.latent_dim + layer.rope_dim + layer.index_head_dim) * BF16
        case RecurrentState():
            state = layer.state_elements * (FLOAT32 if layer.state_dtype else BF16)
            return layer.conv_elements * BF16 + state
        case CompressedCache():
            entries, waiting = divmod(context, layer.rate)
            elements = (
                min(context, layer.window - 1) * layer.head_dim
                + entries * layer.entry_dim
                + waiting * layer.waiting_dim
            )
            overlap = layer.overlap_elements * (BF16 + FLOAT32) if entries else 0
            return elements * BF16 + overlap


def tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in a cache layer: attributes, and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)


def kept_bytes(layer: object) -> int:
    """Bytes of a layer of transformers' cache; keys that are the values too count once, the
    counters of sliding layers not at all."""
    found = {id(t): t for t in tensors(vars(layer)) if t.is_floating_point()}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


@pytest.fixture(scope="module", params=OTHER_CACHES)
def running(request, tmp_path_factory) -> tuple[str, oracle.Model]:
    """A tiny model, loaded in bfloat16 as a checkpoint would be: loading decides what stays
    float32."""
    config = {"model_type": request.param, **TINY[request.param]}
    folder = tmp_path_factory.mktemp(request.param)
    model = oracle.build_model(config, ARCHITECTURES[request.param].class_name, device="cpu")
    model.save_pretrained(folder)
    # The grouped multiplication of experts wants widths that a tiny model does not have.
    model = type(model).from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    )
    return request.param, model.eval()


@pytest.mark.parametrize("context", [2, 11])
def test_every_layer_keeps_the_bytes_of_its_record(running, context):
    """After the prompt, and after each of two tokens on top of it."""
    model_type, model = running
    layers = ARCHITECTURES[model_type].cache_layers
    tokens, cache = torch.arange(context + 2).reshape(1, -1) % 40 + 1, None
    # Mamba models hand their cache around under a name of its own.
    own = "cache_params" in signature(model.forward).parameters
    name = "cache_params" if own else "past_key_values"
    for start, end in ((0, context), (context, context + 1), (context + 1, context + 2)):
        with torch.no_grad():
            cache = model(input_ids=tokens[:, start:end], use_cache=True, **{name: cache})[name]
        kept = [size for size in map(kept_bytes, cache.layers) if size]
        assert kept == [expected_bytes(layer, end) for layer in layers]


def test_the_types_with_other_caches_are_known():
    assert {
        kind: {type(layer) for layer in ARCHITECTURES[kind].cache_layers} for kind in OTHER_CACHES
    }.items() >= {
        "deepseek_v2": {LatentCache},
        "deepseek_v3": {LatentCache},
        "deepseek_v32": {LatentCache},
        "deepseek_v4": {AttentionCache, CompressedCache},
        "glm_moe_dsa": {LatentCache},
        "jamba": {AttentionCache, RecurrentState},
        "kimi_k25": {LatentCache},
        "mamba": {RecurrentState},
        "mamba2": {RecurrentState},
        "nemotron_h": {AttentionCache, RecurrentState},
    }.items()


def test_deepseek_v3_keeps_70272_bytes_per_token():
    layers = build_architecture({"model_type": "deepseek_v3"}).cache_layers
    assert sum(expected_bytes(layer, 1) for layer in layers) == 70_272
