"""Every known model type beyond the published configs: defaults, variations, caches."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from qtool.architecture import (
    KNOWN_MODEL_TYPES,
    Architecture,
    AttentionCache,
    RecurrentState,
    build_architecture,
)
from qtool.architecture.model_types import FAMILIES
from qtool.errors import QtoolError
from tests.architecture import oracle
from tests.architecture.families import TINY, VARIATIONS

# Types whose layers keep keys and values per head, or a state; test_cache looks at all others.
KEYS_AND_VALUES = [
    model_type
    for model_type in KNOWN_MODEL_TYPES
    if all(
        isinstance(layer, AttentionCache | RecurrentState)
        for layer in build_architecture({"model_type": model_type, **TINY[model_type]}).cache_layers
    )
]


def assert_same_model(ours: Architecture, model: oracle.Model) -> None:
    assert list(oracle.parameters(model).items()) == [
        (name, tensor.shape) for name, tensor in ours.tensors.items()
    ]
    ties = {t.name: t.tied_to for t in ours.tensors.values() if t.tied_to is not None}
    assert ties == oracle.tied(model)
    assert set(ours.skipped_modules) == oracle.default_skips(model)
    assert set(ours.quantizable()) == oracle.would_replace(model, ours.skipped_modules)


def activations(model: oracle.Model) -> set[str]:
    """What the decoder's dense MLPs apply between their linear layers."""
    found = set()
    for name, module in model.named_modules():
        is_mlp = re.search(r"(layers|h)\.\d+(\.mlp|\.feed_forward|\.block)?$", name)
        is_text = "vision" not in name and "visual" not in name and "audio" not in name
        for attribute in ("act", "act_fn", "activation_fn", "gelu_impl"):
            activation = getattr(module, attribute, None)
            if is_mlp and is_text and isinstance(activation, torch.nn.Module):
                found.add(type(activation).__name__)
    return found


ACTIVATION_KEYS = {
    "bloom": None,
    "falcon": "activation",
    "gpt2": "activation_function",
    "nemotron_h": "mlp_hidden_act",
    "opt": "activation_function",
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text"), "hidden_activation"),
}
PLAIN_TYPES = [
    model_type
    for model_type in KNOWN_MODEL_TYPES
    if "mamba" not in model_type and "text_config" not in TINY[model_type]
]


@pytest.mark.parametrize("model_type", PLAIN_TYPES)
def test_the_activation_is_the_config_s_or_transformers_default(model_type):
    config = {"model_type": model_type, **TINY[model_type]}
    ours = build_architecture(config)
    model = oracle.build_model(config, ours.class_name)
    if ours.activation == "bloom_gelu":
        assert activations(model) == {"BloomGelu"}
        return
    assert activations(model) <= {type(ACT2FN[ours.activation]).__name__}
    key = ACTIVATION_KEYS.get(model_type, "hidden_act")
    assert getattr(model.config, key) == ours.activation
    assert build_architecture({**config, key: "quick_gelu"}).activation == "quick_gelu"


def test_every_known_type_is_tested():
    assert set(TINY) == set(KNOWN_MODEL_TYPES)


@pytest.mark.parametrize("model_type", KNOWN_MODEL_TYPES)
def test_absent_keys_mean_transformers_defaults(model_type):
    config = {"model_type": model_type}
    ours = build_architecture(config)
    assert_same_model(ours, oracle.build_model(config, ours.class_name))


@pytest.mark.parametrize("model_type", KNOWN_MODEL_TYPES)
def test_tiny_models_agree_and_so_do_their_classifiers(model_type):
    family = FAMILIES[model_type]
    for class_name in (family.generator, family.classifier):
        if class_name is not None:
            config = {"model_type": model_type, "architectures": [class_name], **TINY[model_type]}
            assert_same_model(build_architecture(config), oracle.build_model(config, class_name))


@pytest.mark.parametrize("model_type", sorted(VARIATIONS))
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_small_configs_agree(model_type, data):
    family = FAMILIES[model_type]
    classes = [name for name in (family.generator, family.classifier) if name is not None]
    changes = data.draw(st.fixed_dictionaries({}, optional=VARIATIONS[model_type]))
    class_name = data.draw(st.sampled_from(classes))
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        **TINY[model_type],
        **changes,
    }
    model = oracle.build_model(config, class_name)
    ours = build_architecture(config)
    assert_same_model(ours, model)
    assert [
        getattr(layer, "window", None)
        for layer in ours.cache_layers
        if not isinstance(layer, RecurrentState)
    ] == oracle.cache_windows(model)


@pytest.mark.parametrize("model_type", sorted(KEYS_AND_VALUES))
def test_cache_layers_are_what_a_running_model_keeps(model_type):
    config = {"model_type": model_type, **TINY[model_type]}
    assert_cache_agrees(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "falcon", "multi_query": False},
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 1},
        {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 4},
        {"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"]}
        | {"num_hidden_layers": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_cache_layers_of_special_configs(changes):
    assert_cache_agrees({**TINY[changes["model_type"]], **changes})


def assert_cache_agrees(config: dict[str, object]) -> None:
    """Run eight tokens through the real model and look at what its cache holds."""
    ours = build_architecture(config)
    model = oracle.build_model(config, ours.class_name, device="cpu").eval()
    tokens = torch.arange(8).reshape(1, 8) + 1
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).get("past_key_values")
    layers = [] if cache is None else cache.layers
    layers = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    kept = [(layer.keys.shape[1:], layer.values.shape[1:]) for layer in layers]
    assert kept == [
        (
            (layer.num_kv_heads, tokens_kept, layer.head_dim),
            (layer.num_kv_heads, tokens_kept, layer.value_head_dim),
        )
        for layer in ours.cache_layers
        if isinstance(layer, AttentionCache)
        for tokens_kept in [8 if layer.window is None else min(8, layer.window - 1)]
    ]


def test_what_is_not_modelled_is_named():
    named = {
        model_type: build_architecture({"model_type": model_type, **TINY[model_type]}).unmodelled
        for model_type in KNOWN_MODEL_TYPES
    }
    with_vision = {kind for kind in KNOWN_MODEL_TYPES if "vision_config" in TINY[kind]}
    assert {kind for kind, parts in named.items() if parts} == with_vision
    assert named["qwen3_5"] == ("vision tower activations", "image tokens")
    assert named["gemma4"][2:] == ("audio tower activations", "audio tokens")


def test_broken_variations_that_transformers_refuses_are_refused():
    for changes in (
        {"model_type": "llama", "hidden_size": 30, "head_dim": 8},
        {"model_type": "gpt2", "n_embd": 30},
        {"model_type": "mamba2", "num_heads": 3},
        {"model_type": "gemma2", "layer_types": ["sliding_attention"]},
        {"model_type": "qwen3", "layer_types": ["a", "b", "c"]},
    ):
        config = {**TINY[changes["model_type"]], **changes}
        with pytest.raises(QtoolError) as caught:
            build_architecture(config)
        assert caught.value.kind == "bad_file"
        with pytest.raises(Exception):  # noqa: B017  any refusal of transformers will do
            oracle.build_model(config, FAMILIES[config["model_type"]].generator)
