"""Configs that are unknown, broken or hostile: one clear error each, at once."""

from __future__ import annotations

import pytest

from qtool.architecture import KNOWN_MODEL_TYPES, build_architecture
from qtool.errors import QtoolError
from tests.architecture.families import TINY


def refused(config: dict[str, object]) -> QtoolError:
    with pytest.raises(QtoolError) as caught:
        build_architecture(config)
    assert caught.value.hint
    return caught.value


def test_unknown_types_are_refused_with_their_number_and_the_nearest():
    error = refused({"model_type": "qwen33"})
    assert error.kind == "unsupported"
    assert f"'qwen33' is not supported, {len(KNOWN_MODEL_TYPES)} others are" in error.message
    assert error.message.endswith("the nearest of them: qwen3, qwen3_5, qwen2")
    assert "qtool doctor -v" in error.hint
    for name in ("mlc--phi-2", "nemotron", "x" * 10_000):
        error = refused({"model_type": name})
        assert error.kind == "unsupported" and len(error.message) < 250
    assert "nearest" not in error.message
    assert len(refused({"model_type": None}).message) < 250


def test_unknown_classes_are_refused_with_the_known():
    error = refused({"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]})
    assert error.kind == "unsupported"
    assert "LlamaForCausalLM, LlamaForSequenceClassification" in error.message


@pytest.mark.parametrize("architectures", [None, []])
def test_without_a_class_the_generator_is_meant(architectures):
    config = {"model_type": "llama", "architectures": architectures, **TINY["llama"]}
    assert build_architecture(config).class_name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("model_type", "key", "value", "expected"),
    [
        ("llama", "hidden_size", -1, "a whole number from 1 to 2,147,483,647"),
        ("llama", "hidden_size", 0, "a whole number"),
        ("llama", "hidden_size", "4096", "a whole number"),
        ("llama", "hidden_size", 4096.0, "a whole number"),
        ("llama", "hidden_size", True, "a whole number"),
        ("llama", "hidden_size", None, "a whole number"),
        ("llama", "hidden_size", 2**63, "a whole number"),
        ("llama", "hidden_size", 30, "a multiple of num_attention_heads (4)"),
        ("llama", "num_hidden_layers", 10**12, "a whole number from 1 to 1,024"),
        ("llama", "num_key_value_heads", [2], "a whole number"),
        ("llama", "attention_bias", "yes", "true or false"),
        ("llama", "tie_word_embeddings", 1, "true or false"),
        ("llama", "architectures", "LlamaForCausalLM", "a list"),
        ("llama", "architectures", [7], "a list of class names"),
        ("llama", "layer_types", {}, "a list"),
        ("llama", "layer_types", ["full_attention"], "3 of full_attention, sliding_attention"),
        ("llama", "layer_types", [1, None, []], "3 of full_attention, sliding_attention"),
        ("qwen2", "max_window_layers", -1, "a whole number from 0 to 2,147,483,647"),
        ("gpt2", "n_layer", 10**12, "a whole number from 1 to 1,024"),
        ("gpt2", "n_inner", 0, "a whole number"),
        ("mamba2", "num_heads", 5, "hidden_size * expand / head_dim (4)"),
        ("deepseek_v3", "n_routed_experts", 10**30, "a whole number from 1 to 2,147,483,647"),
        ("deepseek_v3", "num_experts_per_tok", 9, "a whole number from 1 to 8"),
        ("deepseek_v3", "first_k_dense_replace", None, "a whole number from 0"),
        ("deepseek_v32", "q_lora_rank", None, "a whole number from 1"),
        ("deepseek_v32", "layer_types", ["full_attention"] * 3, "3 of indexed_attention"),
        ("deepseek_v32", "mlp_layer_types", ["dense"], "3 of dense, sparse"),
        ("glm_moe_dsa", "index_topk_pattern", "FSX", "1,024 of the letters F S"),
        ("glm_moe_dsa", "indexer_types", ["full"], "at least 3 of full, shared"),
        ("deepseek_v4", "compress_ratios", [0, 8, 4, [4]], "at least 4 of 0, 4, 128"),
        ("deepseek_v4", "o_groups", 3, "a divisor of num_attention_heads * head_dim (64)"),
        ("jamba", "attn_layer_offset", 3, "less than attn_layer_period (3)"),
        ("jamba", "mamba_dt_rank", "half", "a whole number"),
        ("nemotron_h", "hybrid_override_pattern", "", "a list of linear_attention, moe"),
        ("nemotron_h", "hybrid_override_pattern", "M" * 1_025, "at most 1,024 of the letters"),
        ("kimi_k25", "vision_config", {"merge_kernel_size": [2, 0]}, "two whole numbers"),
        ("stablelm", "num_attention_heads", 10**9, "a multiple"),
        ("smollm3", "no_rope_layers", [1], "at least 5 entries"),
        ("gemma3", "text_config", [], "an object"),
        ("mixtral", "num_local_experts", 0, "a whole number from 1"),
        ("mixtral", "num_experts_per_tok", 5, "a whole number from 1 to 4"),
        ("qwen3_moe", "mlp_only_layers", ["0"], "a list of layer numbers"),
        ("qwen3_moe", "mlp_only_layers", [True], "a list of layer numbers"),
        ("qwen3_moe", "decoder_sparse_step", 0, "a whole number from 1"),
        ("qwen3_next", "layer_types", ["attention"] * 3, "4 of linear_attention, full_attention"),
        ("mimo_v2_flash", "mlp_layer_types", ["dense", "moe", "sparse"], "3 of dense, sparse"),
        ("ernie4_5_moe", "moe_layer_end_index", -2, "a whole number from -1"),
        ("llama4_text", "no_rope_layers", [1], "4 entries"),
        ("gemma4_text", "num_kv_shared_layers", 6, "leaves a layer of each kind"),
        ("gemma4_text", "num_kv_shared_layers", 1, "leaves a layer of each kind"),
        ("gemma4_text", "per_layer_config", {"0": {"head_dim": 0}}, "a whole number from 1"),
        ("gemma4", "audio_config", {"subsampling_conv_channels": [1]}, "two whole numbers"),
        ("gemma3", "text_config", {"hidden_size": 0}, "a whole number"),
        ("qwen3_vl", "vision_config", {"depth": 10**9}, "a whole number from 1 to 1,024"),
    ],
)
def test_a_broken_value_names_key_expected_and_found(model_type, key, value, expected):
    config = {"model_type": model_type, **TINY[model_type], key: value}
    error = refused(config)
    assert error.kind == "bad_file"
    assert key in error.message and expected in error.message and "found" in error.message
    assert len(error.message) < 300


def test_a_nested_value_is_named_with_its_path():
    error = refused({"model_type": "gemma3", "text_config": {"hidden_size": "x"}})
    assert "config.json: text_config.hidden_size: expected a whole number" in error.message


def test_a_missing_or_broken_model_type_is_named():
    for config in ({}, {"model_type": None}, {"model_type": 3}):
        error = refused(config)
        assert error.kind == "bad_file" and "model_type" in error.message


def test_products_of_large_values_are_refused_before_anything_is_allocated():
    error = refused(
        {
            "model_type": "stablelm",
            "qk_layernorm": True,
            "num_hidden_layers": 1_024,
            "hidden_size": 2**30,
            "num_attention_heads": 2**30,
        }
    )
    assert error.kind == "bad_file" and "num_attention_heads" in error.message


def test_a_classifier_without_labels_is_refused():
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        **TINY["llama"],
    }
    for labels in ({}, ["A", "B"]):
        assert refused({**config, "id2label": labels}).kind == "bad_file"
    assert build_architecture({**config, "id2label": {"0": "a", "1": "b", "2": "c"}}).tensors[
        "score.weight"
    ].shape == (3, 32)


def test_unsupported_parts_of_known_types_are_refused():
    cross = {"model_type": "gpt2", **TINY["gpt2"], "add_cross_attention": True}
    assert "cross attention" in refused(cross).message
    text = {"model_type": "kimi_k25", "text_config": {"model_type": "llama"}}
    assert "'llama'" in refused(text).message
    tower = {"model_type": "gemma3", "vision_config": {"model_type": "clip_vision_model"}}
    assert "clip_vision_model" in refused(tower).message
