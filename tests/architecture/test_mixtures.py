"""Mixtures of experts: what one token uses, stored experts, and layers that differ."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoConfig

from qtool.architecture import Architecture, AttentionCache, RecurrentState, build_architecture
from tests.architecture import oracle
from tests.architecture.families import TINY
from tests.architecture.mixtures import TINY as MIXTURES
from tests.architecture.test_families import assert_cache_agrees, assert_same_model


def tiny(model_type: str, **changes: object) -> Architecture:
    return build_architecture({"model_type": model_type, **TINY[model_type], **changes})


@pytest.mark.parametrize(
    ("folder", "billions"),
    [("mistralai--Mixtral-8x7B-v0.1", 12.88), ("Qwen--Qwen3-30B-A3B", 3.35)],
)
def test_active_parameters_are_those_the_models_are_known_for(test_data, folder, billions):
    config = json.loads((test_data / "configs" / folder / "config.json").read_text())
    ours = build_architecture(config)
    assert ours.num_active_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert ours.num_active_parameters < ours.num_parameters


@pytest.mark.parametrize("model_type", sorted(set(MIXTURES) - {"gemma4_text"}))
def test_experts_are_whole_parameters_that_bitsandbytes_does_not_replace(model_type):
    ours = tiny(model_type)
    assert ours.experts is not None
    assert (ours.experts.num_experts, ours.experts.experts_per_token) in [(4, 2), (4, 1)]
    experts = {t.name for t in ours.tensors.values() if t.kind.startswith("experts")}
    assert experts and not experts & set(ours.replaced(()))
    for tensor in ours.tensors.values():
        routed = ".experts." in tensor.name
        assert (tensor.experts_per_token is not None) == routed
        assert not routed or tensor.shape[0] == 4


def test_experts_have_their_widths_in_the_record():
    experts = tiny("qwen2_moe").experts
    assert experts is not None
    assert (experts.intermediate_size, experts.shared_intermediate_size) == (12, 20)
    glm = tiny("glm4_moe", n_shared_experts=3).experts
    assert glm is not None and glm.shared_intermediate_size == 36
    assert tiny("gemma4_text").experts is None


@pytest.mark.parametrize(
    ("model_type", "stored", "name"),
    [
        (
            "mixtral",
            "model.layers.2.block_sparse_moe.experts.3.w1.weight",
            "model.layers.2.mlp.experts.gate_up_proj",
        ),
        (
            "mixtral",
            "model.layers.2.block_sparse_moe.experts.3.w2.weight",
            "model.layers.2.mlp.experts.down_proj",
        ),
        (
            "minimax_m2",
            "model.layers.0.block_sparse_moe.experts.0.w3.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
        ),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.mlp.gate.weight",
        ),
        (
            "qwen3_moe",
            "layers.1.mlp.experts.17.up_proj.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
        ),
        (
            "qwen3_5_moe_text",
            "model.language_model.layers.1.mlp.experts.0.down_proj.weight",
            "model.layers.1.mlp.experts.down_proj",
        ),
        (
            "gpt_oss",
            "model.layers.1.mlp.experts.gate_up_proj_blocks",
            "model.layers.1.mlp.experts.gate_up_proj",
        ),
        (
            "gpt_oss",
            "model.layers.1.mlp.experts.down_proj_scales",
            "model.layers.1.mlp.experts.down_proj",
        ),
        (
            "gpt_oss",
            "model.layers.1.mlp.experts.down_proj_bias",
            "model.layers.1.mlp.experts.down_proj_bias",
        ),
        (
            "granitemoe",
            "model.layers.0.block_sparse_moe.input_linear.weight",
            "model.layers.0.block_sparse_moe.experts.gate_up_proj",
        ),
        (
            "mimo_v2_flash",
            "model.layers.1.self_attn.attention_sink_bias",
            "model.layers.1.self_attn.sinks",
        ),
    ],
)
def test_stored_experts_lead_to_the_parameter_they_are_merged_into(model_type, stored, name):
    found = tiny(model_type).find(stored)
    assert found is not None and found.name == name


def test_a_dense_shared_expert_is_no_routed_one():
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    found = tiny("qwen2_moe").find(name)
    assert found is not None and found.name == name and found.experts_per_token is None


def test_every_tensor_of_a_published_mixture_is_found(test_data):
    path = test_data / "configs" / "mirror--WizardLM-2-8x22B"
    ours = build_architecture(json.loads((path / "config.json").read_text()))
    stored = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    found = [ours.find(name) for name in stored]
    assert {tensor.name for tensor in found if tensor is not None} == set(ours.tensors)
    assert None not in found
    assert all(ours.why_kept(name) == "experts" for name in stored if ".experts." in name)


@pytest.mark.parametrize(
    ("model_type", "stored", "reason"),
    [
        ("mimo_v2_flash", "model.mtp.layers.0.mlp.up_proj.weight", "multi-token prediction"),
        ("qwen3_next", "mtp.fc.weight", "multi-token prediction"),
        ("glm4_moe", "model.layers.3.eh_proj.weight", "multi-token prediction"),
        ("minimax_m2", "model.layers.0.block_sparse_moe.e_score_correction_bias", "a buffer"),
        ("gemma4_text", "model.layers.0.layer_scalar", "a buffer"),
        ("llama4_text", "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary frequencies"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w9.weight", "not a parameter of"),
    ],
)
def test_stored_tensors_without_a_parameter_have_a_reason(model_type, stored, reason):
    ours = tiny(model_type)
    assert ours.find(stored) is None
    assert reason in (ours.why_kept(stored) or "")


_SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_SPECIAL = {
    "sharing": _SHARING,
    "sharing-wide": {**_SHARING, "use_double_wide_mlp": True, "attention_bias": True},
    "keys-are-values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "mixture": {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "no-full-layer-at-the-end": {"layer_types": ["sliding_attention"] * 6},
}


@pytest.mark.parametrize("changes", _SPECIAL.values(), ids=_SPECIAL)
@pytest.mark.parametrize("saved", [False, True], ids=["as-published", "saved-by-transformers"])
def test_gemma4_with_layers_that_differ(changes, saved):
    config = {"model_type": "gemma4_text", **copy.deepcopy({**TINY["gemma4_text"], **changes})}
    if saved:  # transformers writes the full layers' heads down per layer
        model_type = config.pop("model_type")
        config = json.loads(AutoConfig.for_model(model_type, **config).to_json_string())
        assert "per_layer_config" in config and "global_head_dim" not in config
    assert_same_model(
        build_architecture(config),
        oracle.build_model(config, "Gemma4ForCausalLM"),
    )
    assert_cache_agrees(config)


def test_gemma4_layers_that_share_keep_nothing_and_their_stored_keys_have_a_reason():
    ours = tiny("gemma4_text", **_SHARING)
    assert len(ours.cache_layers) == 2 and ours.num_layers == 4
    assert "another's keys" in (ours.why_kept("model.layers.3.self_attn.k_proj.weight") or "")
    assert ours.why_kept("model.layers.1.self_attn.k_proj.weight") is None


def test_llama4_attends_in_chunks_where_positions_rotate():
    layers = tiny("llama4_text", attention_chunk_size=4).cache_layers
    chunked, full = layers[0], layers[3]
    assert chunked == AttentionCache(2, 8, 8, window=4, chunked=True)
    assert full == AttentionCache(2, 8, 8)
    assert [layer == chunked for layer in layers] == [True, True, True, False]


def test_mimo_slides_with_twice_the_heads_and_narrow_values():
    layers = tiny("mimo_v2_flash", sliding_window_size=8).cache_layers
    assert layers == (AttentionCache(2, 8, 4), *[AttentionCache(4, 8, 4, window=9)] * 2)


def test_linear_attention_keeps_the_convolutions_inputs_and_a_matrix_per_head():
    """4 value heads and 2 key heads, 8 and 4 wide, kernel 4."""
    layers = tiny("qwen3_next").cache_layers
    state = RecurrentState(conv_elements=(2 * 2 * 8 + 4 * 4) * 4, state_elements=4 * 8 * 4)
    assert layers == (state, state, state, AttentionCache(2, 16, 16))


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_qwen2_vl_ties_its_head_where_either_section_says_so(outer, inner):
    text = {**TINY["qwen2_vl"]["text_config"], "tie_word_embeddings": inner}
    vision = TINY["qwen2_vl"]["vision_config"]
    config = {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision}
    config["tie_word_embeddings"] = outer
    ours = build_architecture(config)
    assert ours.tied_embeddings == (outer or inner)
    assert_same_model(ours, oracle.build_model(config, ours.class_name))


def test_qwen2_vl_configs_may_hold_the_text_values_outermost():
    nested = tiny("qwen2_vl")
    flat = {**TINY["qwen2_vl"]["text_config"], "vision_config": TINY["qwen2_vl"]["vision_config"]}
    assert build_architecture({"model_type": "qwen2_vl", **flat}).tensors == nested.tensors
