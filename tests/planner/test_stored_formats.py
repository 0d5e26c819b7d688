"""Formats of others: published sizes, and which layers they pack."""

from __future__ import annotations

import json

import pytest

from qtool.architecture import ModelTensor
from qtool.planner.model import open_model
from qtool.planner.stored_formats import find_format, fp8_in_blocks, fp8_per_tensor
from tests.tiny_models import llama_config

SHAPE = (4096, 14336)
N = 4096 * 14336


def entry(method, **more):
    return {"quantization_config": {"quant_method": method, **more}}


def test_gpt_oss_120b_in_mxfp4_is_as_large_as_published(test_data):
    model = open_model(str(test_data / "configs" / "openai--gpt-oss-120b"))
    assert model.stored_precision == "mxfp4"
    assert model.weights("mxfp4").checkpoint_bytes == 65_248_815_744


def test_minimax_m2_in_fp8_is_nearly_as_large_as_published(test_data):
    """230,121,630,720 bytes are published for its predecessor of the same shape."""
    model = open_model(str(test_data / "configs" / "MiniMaxAI--MiniMax-M2.5"))
    found = model.weights("fp8").checkpoint_bytes
    assert found == pytest.approx(230_121_630_720, rel=5e-4)


@pytest.mark.parametrize(
    ("config", "label", "num_bytes"),
    [
        (entry("fp8"), "fp8", N + 4),
        (entry("fp8", weight_block_size=[128, 128]), "fp8", N + 4 * 32 * 112),
        (entry("fp8", weight_block_size=[0, 128]), "fp8", N + 4),
        (entry("mxfp4"), "mxfp4", N // 2 + N // 32),
        (entry("modelopt"), "nvfp4", N // 2 + N // 16 + 4),
        (entry("compressed-tensors", format="nvfp4-pack-quantized"), "nvfp4", N // 2 + N // 16 + 4),
        (entry("gptq", bits=4, group_size=128), "gptq", N // 2 + N // 128 * 2 + N // 256),
        (entry("awq", bits=8, group_size=-1), "awq", N + 4096 * 2 + 4096),
        (
            entry(
                "compressed-tensors",
                config_groups={"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
            ),
            "compressed-tensors",
            N // 2 + N // 32 * 2,
        ),
    ],
)
def test_bytes_of_a_matrix(config, label, num_bytes):
    found = find_format(config)
    assert (found.method, found.matrix_bytes(SHAPE)) == (label, num_bytes)


@pytest.mark.parametrize(
    "config",
    [
        {},
        entry("bitsandbytes", load_in_4bit=True),
        {"quantization_config": None},
        {"quantization_config": "fp8"},
        {"quantization_config": {"quant_method": 8}},
    ],
)
def test_no_format_of_others(config):
    assert find_format(config) is None


def test_a_text_model_s_own_entry_counts():
    assert find_format({"text_config": entry("fp8")}).method == "fp8"


@pytest.mark.parametrize(
    ("excluded", "kept"),
    [
        ({"modules_to_not_convert": ["gate", "lm_head"]}, {"model.layers.1.mlp.gate.weight"}),
        ({"ignore": ["re:.*self_attn.*"]}, {"model.layers.1.self_attn.q_proj.weight"}),
        (
            {"modules_to_not_convert": ["model.layers.*.self_attn"]},
            {"model.layers.1.self_attn.q_proj.weight"},
        ),
        ({"ignore": ["re:(", 7]}, set()),  # neither stops the others
    ],
)
def test_excluded_layers_stay_as_they_are(excluded, kept):
    packs = find_format(entry("compressed-tensors", **excluded)).packs
    names = ("mlp.gate", "self_attn.q_proj", "mlp.gate_proj")
    tensors = [ModelTensor(f"model.layers.1.{name}.weight", (8, 8), "linear") for name in names]
    assert {tensor.name for tensor in tensors if not packs(tensor)} == kept
    assert not packs(ModelTensor("model.norm.weight", (8,), "norm"))
    assert not packs(ModelTensor("lm_head.weight", (8, 8), "linear"))
    assert packs(ModelTensor("model.layers.1.mlp.experts.up", (2, 8, 8), "experts"))


def test_mxfp4_packs_the_experts_alone():
    packs = find_format(entry("mxfp4")).packs
    assert packs(ModelTensor("e", (2, 8, 8), "experts_transposed"))
    assert not packs(ModelTensor("q.weight", (8, 8), "linear"))


def test_planning_fp8_of_a_16_bit_model(tmp_path):
    config = {**llama_config(), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path))
    linear = model.architecture.quantizable().values()
    saved = sum(2 * t.shape[0] * t.shape[1] - fp8_per_tensor(t.shape) for t in linear)
    expected = model.weights("bf16").device_bytes - saved
    assert model.weights("fp8").device_bytes == expected


def test_blocks_at_the_edges_have_scales_too():
    assert fp8_in_blocks((129, 256)) == 129 * 256 + 4 * 2 * 2
