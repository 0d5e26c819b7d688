"""Names as checkpoints store them lead to the parameters that transformers loads them into."""

from __future__ import annotations

import json

import pytest
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qtool.architecture import KNOWN_MODEL_TYPES, Architecture, build_architecture
from qtool.architecture.stored_weights import missing_parameters
from tests.architecture import oracle
from tests.architecture.families import TINY


def tiny(model_type: str, **changes: object) -> Architecture:
    return build_architecture({"model_type": model_type, **TINY[model_type], **changes})


def loaded_into(model: oracle.Model, stored_name: str) -> str | None:
    """The parameter that transformers puts the tensor into; None where it drops it."""
    renamings = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    state = model.state_dict()
    name, _ = rename_source_key(stored_name, renamings, [], model.base_model_prefix, state)
    return name if name in state else None


@pytest.mark.parametrize(
    "folder", ["mirror--medgemma-27b-it", "mirror--bloom-176b", "mirror--gemma-2b-it"]
)
def test_every_tensor_of_a_published_index_is_found(test_data, folder):
    path = test_data / "configs" / folder
    config = json.loads((path / "config.json").read_text())
    stored = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    ours = build_architecture(config)
    model = oracle.build_model(config, ours.class_name)
    found = {name: ours.find(name) for name in stored}
    for name in sorted(stored)[::7]:  # transformers' own renaming takes milliseconds for a name
        assert found[name] is not None and found[name].name == loaded_into(model, name)
    # The file is complete: all that it does not store is tied to something it does.
    missing = set(ours.tensors) - {tensor.name for tensor in found.values() if tensor is not None}
    assert all(ours.tensors[name].tied_to is not None for name in missing)


@pytest.mark.parametrize("model_type", KNOWN_MODEL_TYPES)
def test_names_are_found_with_and_without_the_prefix_of_the_base_model(model_type):
    ours = tiny(model_type)
    model = oracle.build_model({"model_type": model_type, **TINY[model_type]}, ours.class_name)
    assert ours.stored_names.prefix == model.base_model_prefix
    for name, tensor in ours.tensors.items():
        assert ours.find(name) is tensor
        without = name.removeprefix(f"{model.base_model_prefix}.")
        assert ours.find(without) is tensor
        assert loaded_into(model, without) == name


@pytest.mark.parametrize(
    ("model_type", "stored", "name"),
    [
        ("gpt2", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        (
            "gemma3",
            "language_model.model.layers.1.mlp.up_proj.weight",
            "model.language_model.layers.1.mlp.up_proj.weight",
        ),
        (
            "gemma3",
            "vision_tower.vision_model.post_layernorm.bias",
            "model.vision_tower.post_layernorm.bias",
        ),
        (
            "gemma3",
            "model.vision_tower.vision_model.post_layernorm.bias",
            "model.vision_tower.post_layernorm.bias",
        ),
        ("gemma3", "language_model.lm_head.weight", "lm_head.weight"),
        ("qwen3_5_text", "model.language_model.norm.weight", "model.norm.weight"),
        ("qwen2_vl", "visual.merger.ln_q.bias", "model.visual.merger.ln_q.bias"),
        ("qwen2_vl", "model.norm.weight", "model.language_model.norm.weight"),
    ],
)
def test_old_names_are_followed(model_type, stored, name):
    ours = tiny(model_type)
    found = ours.find(stored)
    assert found is not None and found.name == name
    model = oracle.build_model({"model_type": model_type, **TINY[model_type]}, ours.class_name)
    assert loaded_into(model, stored) == name


@pytest.mark.parametrize(
    ("model_type", "stored", "reason"),
    [
        (
            "llama",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "rotary frequencies, which the model computes itself",
        ),
        ("gpt2", "h.0.attn.bias", "a causal mask, which the model computes itself"),
        (
            "gpt2",
            "transformer.h.2.attn.masked_bias",
            "a causal mask, which the model computes itself",
        ),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention.bias",
            "a causal mask, which the model computes itself",
        ),
        (
            "qwen3_5",
            "mtp.fc.weight",
            "the multi-token prediction layer, which transformers leaves out",
        ),
        ("llama", "model.layers.99.mlp.up_proj.weight", "not a parameter of LlamaForCausalLM"),
        ("llama", "", "not a parameter of LlamaForCausalLM"),
    ],
)
def test_what_the_model_has_no_parameter_for_gets_a_reason(model_type, stored, reason):
    ours = tiny(model_type)
    assert ours.find(stored) is None
    assert ours.why_kept(stored) == reason


def test_every_kept_tensor_has_a_reason_and_every_quantized_one_has_none():
    for model_type in KNOWN_MODEL_TYPES:
        ours = tiny(model_type)
        skip = ["down_proj", "fc2"]
        quantized = ours.quantizable(skip)
        assert {name for name in ours.tensors if ours.why_kept(name, skip) is None} == set(
            quantized
        )


def test_reasons_say_what_the_tensor_is():
    llama = tiny("llama")
    assert llama.why_kept("lm_head.weight") == "output head, kept by default"
    assert llama.why_kept("model.embed_tokens.weight") == "embedding"
    assert llama.why_kept("model.norm.weight") == "norm"
    up = "model.layers.0.mlp.up_proj.weight"
    assert llama.why_kept(up) is None
    assert llama.why_kept(up, ["up_proj"]) == "skipped by 'up_proj'"
    tied = tiny("llama", tie_word_embeddings=True)
    assert tied.why_kept("lm_head.weight") == "tied to model.embed_tokens.weight"
    falcon = "transformer.h.0.mlp.dense_h_to_4h.weight"
    assert "subclass of nn.Linear" in (tiny("falcon").why_kept(falcon) or "")


def test_what_is_in_no_file_is_known_from_the_names():
    llama = tiny("llama")
    names = set(llama.tensors)
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    assert missing_parameters(names, llama) == []
    assert missing_parameters(names - {norm, up}, llama) == [up, norm]
    bare = {name.removeprefix("model.") for name in names - {up}}  # as base models are saved
    assert missing_parameters(bare, llama) == [up]


def test_what_is_in_no_file_is_left_open_where_names_are_not_all_known():
    llama = tiny("llama")
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    names = set(llama.tensors) - {norm, up}
    assert missing_parameters({*names, "some.other.weight"}, llama) == []
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert missing_parameters({*names, buffer}, llama) == [up]  # its like in layer 0 is there


def test_either_of_two_tied_weights_is_enough():
    tied = tiny("llama", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert tied.tensors[head].tied_to == embedding
    for name in (embedding, head):
        assert missing_parameters(set(tied.tensors) - {name}, tied) == []
    assert missing_parameters(set(tied.tensors) - {embedding, head}, tied) == [embedding]


@pytest.mark.parametrize(
    "folder", ["mirror--medgemma-27b-it", "mirror--bloom-176b", "mirror--gemma-2b-it"]
)
def test_nothing_is_missing_from_a_published_index(test_data, folder):
    path = test_data / "configs" / folder
    config = json.loads((path / "config.json").read_text())
    stored = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert missing_parameters(stored, build_architecture(config)) == []
