"""Random models: of the true shape, of the size that real weights have, the same every time."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.model_shapes import MODEL_SHAPES
from qtool.errors import QtoolError
from qtool.formats.precisions import QuantFormat
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.random_model import build_random_model, packed_layer, random_linear
from tests.tiny_models import llama_config

CPU = torch.device("cpu")
PRECISIONS = ["bf16", "fp16", "fp32", "int8", "fp4", "fp4-dq", "nf4", "nf4-dq"]


def build(precision="nf4-dq", config=None, **options):
    return build_random_model(config or llama_config(), precision, device="cpu", **options)


def make_linear(precision, shape=(96, 320), seed=3):
    layer = packed_layer(*shape, QuantFormat(precision), torch.float32)
    return random_linear(layer, device=CPU, seed=seed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_in_any_precision_has_finite_logits_that_depend_on_the_text(precision):
    loaded = build(precision)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = loaded.model(ids).logits
    assert logits.isfinite().all() and logits.dtype == loaded.model.dtype
    assert logits.std() > 0.05 and not torch.equal(logits[0], logits[1])
    assert loaded.num_packed_layers == (0 if precision in ("bf16", "fp16", "fp32") else 14)
    assert loaded.max_context == 128 and loaded.devices == "cpu" and loaded.tokenizer is None


def test_the_config_is_the_one_given():
    config = llama_config(layers=3, mlp=192)
    found = build(config=config).model.config
    assert {name: getattr(found, name) for name in config} == config


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_output_head_leaves_the_embedding_alone(tied):
    loaded = build(config=llama_config(tied=tied), head_precision="int8")
    head, embedding = loaded.model.lm_head, loaded.model.model.embed_tokens
    assert isinstance(head, LinearInt8) and head.weight.dtype == torch.int8
    assert embedding.weight.dtype == torch.bfloat16
    assert loaded.num_packed_layers == 15
    with torch.inference_mode():
        assert loaded.model(torch.arange(5)[None]).logits.std() > 0.05


def test_the_same_call_gives_the_same_model_and_no_two_layers_are_alike():
    one, two = (build("nf4-dq").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (one[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("precision", ["int8", "fp4", "fp4-dq", "nf4", "nf4-dq"])
def test_packed_weights_have_the_size_of_gaussians(precision):
    values = make_linear(precision, (256, 1024)).dequantize()
    assert 0.015 < values.std() < 0.035
    assert values.mean().abs() < 2e-3  # not 0: NF4 has one code more above zero than below
    assert values.abs().max() < 0.14  # seven standard deviations


def test_absmax_is_that_of_gaussian_blocks():
    drawn = make_linear("nf4", (512, 1024)).absmax
    generator = torch.Generator().manual_seed(4)
    blocks = torch.empty(8192, 64).normal_(0, 0.02, generator=generator)
    expected = blocks.abs().amax(dim=1)
    levels = torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98])
    ratio = drawn.quantile(levels) / expected.quantile(levels)
    assert (ratio - 1).abs().max() < 0.02


def test_double_quantization_keeps_absmax_within_a_step_of_its_map():
    nested, plain = make_linear("nf4-dq", (512, 1024)), make_linear("nf4", (512, 1024))
    assert isinstance(nested, Linear4bit) and nested.absmax.dtype == torch.uint8
    difference = nested.dequantize() - plain.dequantize()
    assert 0 < difference.norm() / plain.dequantize().norm() < 0.02


def test_odd_sizes_fit_their_module():
    module = make_linear("nf4-dq", (7, 45))
    assert module.weight.shape == (158, 1) and module.absmax.shape == (5,)
    assert module(torch.ones(1, 45)).shape == (1, 7)


def test_what_cannot_be_packed_is_refused():
    mixture = {
        **llama_config(),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    with pytest.raises(QtoolError, match="mixture") as caught:
        build("nf4", mixture)
    assert caught.value.kind == "unsupported"
    with pytest.raises(QtoolError, match="fp8"):
        build("fp8")


def test_shapes_with_few_layers_are_known_models():
    for config in MODEL_SHAPES.values():
        small = {**config, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
        assert build("int8", small).model.config.model_type == "llama"
