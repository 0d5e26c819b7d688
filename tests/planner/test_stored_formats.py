"""Formats of others: published sizes, and which layers they pack."""

from __future__ import annotations

import json

import pytest

from qtool.architecture import ModelTensor
from qtool.planner.estimate import EstimateRequest, estimate_model
from qtool.planner.model import open_model
from qtool.planner.stored_formats import find_format
from qtool.planner.stored_methods import FP8_TENSOR, PackedLayout
from tests.planner.foreign import write_fp8
from tests.planner.plans import plan_of
from tests.tiny_models import llama_config

SHAPE = (4096, 14336)
N = 4096 * 14336


def entry(method, **more):
    return {"quantization_config": {"quant_method": method, **more}}


def compressed(**weights):
    return entry("compressed-tensors", config_groups={"group_0": {"weights": weights}})


def quark(**weights):
    return entry("quark", global_quant_config={"weight": weights})


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
        (entry("fp8", weight_block_size=[128, 128], scale_fmt="ue8m0"), "fp8", N + 32 * 112),
        (entry("finegrained_fp8"), "fp8", N + 4),
        (entry("fbgemm_fp8"), "fp8", N + 4 * 4096),
        (entry("mxfp8"), "mxfp8", N + N // 32),
        (entry("modelopt", quant_algo="NVFP4"), "nvfp4", N // 2 + N // 16 + 4),
        (entry("modelopt", quant_algo="FP8"), "fp8", N + 4),
        (entry("modelopt", quant_algo="MXFP8"), "mxfp8", N + N // 32),
        (entry("modelopt", quant_algo="W4A16_AWQ"), "modelopt", N // 2 + N // 128 * 2),
        (entry("compressed-tensors", format="nvfp4-pack-quantized"), "nvfp4", N // 2 + N // 16 + 4),
        (entry("gptq", bits=4, group_size=128), "gptq", N // 2 + N // 128 * 2 + N // 256),
        (entry("awq", bits=8, group_size=-1), "awq", N + 4096 * 2 + 4096),
        (entry("awq", w_bit=4, q_group_size=64), "awq", N // 2 + N // 64 * 2 + N // 128),
        (entry("awq", zero_point=False), "awq", N // 2 + N // 128 * 2),
        (entry("auto-round", bits=8), "auto-round", N + N // 128 * 3),
        (entry("eetq", weights="int8"), "eetq", N + 4096 * 2),
        (entry("bitnet"), "bitnet", N // 4 + 2),
        (entry("quanto", weights="int8"), "quanto", N + 4096 * 2),
        (entry("quanto", weights="float8"), "quanto", N + 4096 * 2),
        (entry("quanto", weights="int4"), "quanto", N // 2 + N // 128 * 4),
        (entry("hqq", nbits=8, group_size=64), "hqq", N + N // 64 * 4),
        (
            entry("hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 32}}),
            "hqq",
            N // 2 + N // 32 * 4,
        ),
        (entry("aqlm"), "aqlm", N // 4 + 4096 * 2 + 65536 * 8 * 2),
        (
            entry("aqlm", num_codebooks=2, nbits_per_codebook=8),
            "aqlm",
            N // 4 + 4096 * 2 + 2 * 256 * 8 * 2,
        ),
        (
            entry("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}),
            "torchao",
            N + 4096 * 2,
        ),
        (
            entry(
                "torchao",
                quant_type={
                    "default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}}
                },
            ),
            "torchao",
            N // 2 + N // 32 * 4,
        ),
        (
            entry("torchao", quant_type="int4_weight_only", quant_type_kwargs={"group_size": 64}),
            "torchao",
            N // 2 + N // 64 * 4,
        ),
        (
            entry(
                "torchao",
                quant_type={"default": {"_type": "Float8DynamicActivationFloat8WeightConfig"}},
            ),
            "torchao",
            N + 4096 * 4,
        ),
        (quark(dtype="fp8_e4m3", qscheme="per_tensor"), "quark", N + 4),
        (quark(dtype="fp8_e4m3", qscheme="per_channel"), "quark", N + 4 * 4096),
        (
            quark(dtype="fp4", qscheme="per_group", group_size=32, scale_format="e8m0"),
            "quark",
            N // 2 + N // 32,
        ),
        (quark(dtype="int8", qscheme="per_channel"), "quark", N + 2 * 4096),
        (
            quark(dtype="uint4", qscheme="per_group", group_size=128),
            "quark",
            N // 2 + N // 128 * 2 + N // 256,
        ),
        (compressed(num_bits=4, group_size=32), "compressed-tensors", N // 2 + N // 32 * 2),
        (
            compressed(num_bits=8, type="float", strategy="channel"),
            "compressed-tensors",
            N + 4096 * 2,
        ),
        (compressed(num_bits=8, type="float", strategy="tensor"), "compressed-tensors", N + 2),
        (
            compressed(num_bits=8, strategy="block", block_structure=[128, 128]),
            "compressed-tensors",
            N + 2 * 32 * 112,
        ),
        (
            compressed(num_bits=4, strategy="group", group_size=128, symmetric=False),
            "compressed-tensors",
            N // 2 + N // 128 * 2 + N // 256,
        ),
    ],
)
def test_bytes_of_a_matrix(config, label, num_bytes):
    found = find_format(config)
    assert (found.method, found.matrix_bytes(SHAPE)) == (label, num_bytes)


@pytest.mark.parametrize(
    "config",
    [
        entry("vptq", bits=2),
        entry("what comes next"),
        entry("gptq"),
        entry("gptq", bits=400),
        entry("gptq", bits=4, group_size="all"),
        entry("hqq", nbits=3),
        entry("hqq", quant_config={"self_attn.q_proj": {"weight_quant_params": {"nbits": 4}}}),
        entry("quanto", weights="int5"),
        entry("bitnet", quantization_mode="online"),
        entry("fp8", expert_dtype="fp4"),
        entry("modelopt"),
        entry("modelopt", quant_algo="MIXED_PRECISION"),
        entry("torchao", quant_type={"default": {"_type": "Int8DynamicActivationInt4Weight"}}),
        entry("torchao", quant_type={"default": {"_type": "ModuleFqnToConfig"}}),
        entry("quark"),
        entry("quark", global_quant_config={"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]}),
        entry("compressed-tensors"),
        entry(
            "compressed-tensors",
            config_groups={
                "a": {"weights": {"num_bits": 4, "group_size": 32}},
                "b": {"weights": {"num_bits": 8, "strategy": "channel"}},
            },
        ),
        entry("aqlm", nbits_per_codebook=64),
    ],
)
def test_what_is_not_known_is_not_guessed(config, tmp_path):
    found = find_format(config)
    assert found.layout is None
    plain = {**llama_config(hidden=256, mlp=512), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**plain, **config}))
    model = open_model(str(tmp_path))
    plan = plan_of(model, found.method, context=16)
    assert plan.components["weights"].basis == "heuristic"
    unpacked = plan_of(model, "bf16", context=16).components["weights"]
    assert plan.components["weights"].bytes == unpacked.bytes
    (warning,) = model.warnings
    assert f"quant_method {found.method!r} of config.json" in warning
    assert "the most that they can take" in warning


def test_known_formats_are_formulas_and_our_own_precisions_exact(tmp_path):
    config = {**llama_config(), "dtype": "bfloat16", **entry("eetq")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path))
    bases = {
        quant: plan_of(model, quant, context=16).components["weights"].basis
        for quant in ("eetq", "bf16", "nf4")
    }
    assert bases == {"eetq": "formula", "bf16": "exact", "nf4": "exact"}
    assert model.warnings == ()


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
        ({"exclude": ["*self_attn*"]}, {"model.layers.1.self_attn.q_proj.weight"}),
        (
            {"linear_weights_not_to_quantize": ["model.layers.1.mlp.gate.weight"]},
            {"model.layers.1.mlp.gate.weight"},
        ),
        ({"ignore": ["re:.*self_attn.*"]}, {"model.layers.1.self_attn.q_proj.weight"}),
        (
            {"modules_to_not_convert": ["model.layers.*.self_attn"]},
            {"model.layers.1.self_attn.q_proj.weight"},
        ),
        ({"ignore": ["re:(", 7]}, set()),  # neither stops the others
    ],
)
def test_excluded_layers_stay_as_they_are(excluded, kept):
    packs = find_format(entry("mxfp8", **excluded)).packs
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
    saved = sum(2 * t.shape[0] * t.shape[1] - FP8_TENSOR.num_bytes(t.shape) for t in linear)
    expected = model.weights("bf16").device_bytes - saved
    assert model.weights("fp8").device_bytes == expected


@pytest.mark.parametrize("config", [entry("fp8"), {}])
def test_files_in_fp8_are_planned_as_they_are_and_from_the_config(tmp_path, config):
    write_fp8(tmp_path, **config)
    found = estimate_model(EstimateRequest(str(tmp_path)))
    bases = {plan.quant: plan.components["weights"].basis for plan in found.plans}
    others = ("bf16", "int8", "nf4", "nf4-dq")
    assert bases == {"fp8": "header", **dict.fromkeys(others, "exact")}
    stored = sum(layout.num_bytes for layout in open_model(str(tmp_path)).layouts.values())
    assert found.plans[0].checkpoint_bytes == stored
    said = [warning for warning in found.warnings if "of which config.json says nothing" in warning]
    assert len(said) == (not config)


def test_blocks_at_the_edges_have_scales_too():
    layout = PackedLayout(8, 4, rows=128, columns=128)
    assert layout.num_bytes((129, 256)) == 129 * 256 + 4 * 2 * 2
    assert layout.num_bytes((3, 129, 256)) == 3 * layout.num_bytes((129, 256))
