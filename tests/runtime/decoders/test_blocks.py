"""What the fused kernels are told of a model, and what they are said not to do; without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("cupy", exc_type=ImportError)

from qtool.runtime.decoders.blocks import UNTURNED, NotFusable, describe_network
from qtool.runtime.decoders.fused_attention import attention_shape, check_rotary
from qtool.runtime.random_model import build_random_model
from tests.runtime.decoders.common_blocks import BASE, MODELS

ADDED_NORMS = {"gemma2", "gemma3", "gemma3_text"}


def load(name="llama", quant="nf4-dq", **changes):
    config = BASE | MODELS[name] | changes
    return build_random_model(config, quant, device="cpu", model_id=name).model


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_found_where_the_model_has_it(name, quant):
    model = load(name, quant)
    network = describe_network(model)
    config = model.config.get_text_config()
    assert len(network.blocks) == config.num_hidden_layers
    block = network.blocks[-1]
    rows = sum(layer.weight.rows for layer in block.query_key_value)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    assert rows == heads * network.head_dim
    assert {layer.weight.rows for layer in block.gate_up} == {config.intermediate_size}
    expected = {"nf4-dq": "nf4", "int8": "int8", "bf16": "plain"}[quant]
    assert {layer.kind.format for layer in (*block.query_key_value, block.down)} == {expected}
    assert network.head.kind.format == "plain"
    assert network.head.weight.rows == config.vocab_size
    shape = attention_shape(network, model, batch=1, capacity=64)
    head_norms = {"qwen3": "rms", "gemma3": "rms_plus_one", "gemma3_text": "rms_plus_one"}
    assert shape.head_norm == head_norms.get(name, "none")
    assert shape.has_softcap == (name == "gemma2")
    assert shape.rotary_dim == network.head_dim
    assert (block.attention.window > 0) == ("window" in name or name in ADDED_NORMS)
    assert (network.embedding_scale is not None) == ("gemma" in name)
    assert network.gate == ("gelu_tanh" if "gemma" in name else "silu")
    assert {block.has_added_norms for block in network.blocks} == {name in ADDED_NORMS}
    norms = [block.attention_norm, block.mlp_norm, block.output_norm, block.down_norm]
    assert len({id(norm.weight) for norm in norms if norm}) == (4 if name in ADDED_NORMS else 2)


def test_layers_differ_where_the_config_says_so():
    blocks = describe_network(load("gemma3_text")).blocks
    assert [block.attention.layer_type for block in blocks] == MODELS["gemma3_text"]["layer_types"]
    assert [block.attention.window for block in blocks] == [24, 0, 24]
    first, second, third = describe_network(load("smollm3")).blocks
    assert first.attention == third.attention
    assert second.attention == replace(first.attention, layer_type=UNTURNED)


def test_caps_are_those_that_the_type_looks_at():
    caps = {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 9.0}

    def found(name):
        network = describe_network(load(name, **caps))
        return network.blocks[0].attention.softcap, network.logit_softcap

    assert found("gemma2") == (7, 9)
    assert found("gemma3_text") == (0, 9)
    assert found("llama") == (0, 0)
    text = MODELS["gemma3"]["text_config"] | caps
    network = describe_network(load("gemma3", text_config=text))
    assert network.logit_softcap == 0


def test_gate_and_up_of_one_layer_are_its_halves():
    model = load("phi3", "nf4")
    joined = model.model.layers[0].mlp.gate_up_proj
    gate, up = describe_network(model).blocks[0].gate_up
    half = joined.out_features // 2 * joined.in_features
    assert gate.weight.weight == joined.weight.data_ptr()
    assert up.weight.weight == joined.weight.data_ptr() + half // 2
    assert up.weight.absmax == joined.absmax.data_ptr() + half // 64 * 4


def test_what_is_not_fused_is_said():
    with pytest.raises(NotFusable, match="olmo2 blocks have no fused kernels"):
        model = load()
        model.config.model_type = "olmo2"
        describe_network(model)
    with pytest.raises(NotFusable, match="sees later tokens"):
        describe_network(load("gemma3_text", use_bidirectional_attention=True))
    with pytest.raises(NotFusable, match="not float32"):
        describe_network(load(quant="fp32"))
    with pytest.raises(NotFusable, match="another device"):
        model = load()
        model.model.layers[1].mlp.down_proj.to("meta")
        describe_network(model)
    with pytest.raises(NotFusable, match="torch's Sequential"):
        model = load()
        model.model.layers[1].mlp.down_proj = nn.Sequential()
        describe_network(model)
    with pytest.raises(NotFusable, match="columns does not fit"):
        describe_network(load(intermediate_size=96))
    with pytest.raises(NotFusable, match="packed in different ways"):
        model = load()
        other = load(quant="int8")
        model.model.layers[0].self_attn.k_proj = other.model.layers[0].self_attn.k_proj
        describe_network(model)
    with pytest.raises(NotFusable, match="layers compute in float16, activations are bfloat16"):
        model = load()
        model.model.layers[0].mlp.down_proj.compute_dtype = torch.float16
        describe_network(model)
    with pytest.raises(NotFusable, match="dynamic rotary embedding"):
        model = load()
        model.model.rotary_emb.rope_type = "dynamic"
        check_rotary(model)
    with pytest.raises(NotFusable, match="4 query heads for 3 key heads"):
        network = describe_network(load())
        object.__setattr__(network, "num_heads", 4)
        object.__setattr__(network, "num_kv_heads", 3)
        attention_shape(network, load(), batch=1, capacity=64)
