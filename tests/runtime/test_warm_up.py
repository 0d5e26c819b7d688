"""Which kernels are made ready while weights load, without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cupy_kernels import linear_many
from cupy_kernels.linear_few import LinearKind, SharedMemory, specialise
from qtool.defaults import PREFILL_CHUNK
from qtool.runtime import warm_up
from qtool.runtime.linear import FourBitLayer, Int8Layer

KIND = LinearKind("nf4", 1024, "BF16", nested=True)
SIZES = {"q_proj": 1024, "k_proj": 256, "v_proj": 256, "o_proj": 1024}


def four_bit(out_features: int, in_features: int = 1024) -> FourBitLayer:
    return FourBitLayer(out_features, in_features, "nf4", 64, torch.bfloat16, True)


@pytest.fixture
def layers():
    blocks = {
        f"model.layers.{index}.self_attn.{name}": four_bit(size)
        for index in range(3)
        for name, size in SIZES.items()
    }
    mlp = {
        "gate_proj": four_bit(2816),
        "up_proj": four_bit(2816),
        "down_proj": four_bit(1024, 2816),
    }
    return blocks | {f"model.layers.0.mlp.{name}": layer for name, layer in mlp.items()}


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, for a GPU of Hopper."""
    found = []
    monkeypatch.setattr(warm_up, "compile_for", lambda kind, count, max_tokens: None)
    monkeypatch.setattr(linear_many, "compiles_for", lambda target: target == "sm_90")
    monkeypatch.setattr(linear_many, "num_multiprocessors", lambda: 132)
    monkeypatch.setattr(linear_many, "_load", lambda kind, shape: found.append((kind, shape)))
    return found


def config_of(model_type="llama", **settings):
    text = SimpleNamespace(model_type=model_type, **{"hidden_act": "silu", **settings})
    return SimpleNamespace(get_text_config=lambda: text)


def programs(layers):
    return warm_up._programs(config_of(), layers, torch.bfloat16, adapted=False)


def kinds(layers, config):
    return set(warm_up._kinds(config, layers, torch.bfloat16, adapted=False))


def test_layers_of_a_launch_are_taken_together(layers):
    launches = set(warm_up._prompt_launches(layers, torch.bfloat16))
    down = replace(KIND, columns=2816)
    together = {(KIND, (1024, 256, 256)), (KIND, (2816, 2816))}
    assert together <= launches
    # Alone they are launched by models whose blocks are not the usual ones.
    assert launches - together == {(KIND, (rows,)) for rows in (256, 1024, 2816)} | {
        (down, (1024,))
    }


def test_each_kernel_of_a_prompt_is_compiled_once(layers, compiled):
    for program in programs(layers):
        program()
    made = [linear_many.defines_of(kind, shape).items() for kind, shape in compiled]
    assert made
    assert len({tuple(defines) for defines in made}) == len(made)
    wanted = {
        linear_many.shape_on(rows, kind.columns, tokens)
        for kind, rows in warm_up._prompt_launches(layers, torch.bfloat16)
        for tokens in warm_up.PROMPT_TOKENS
    }
    assert {shape for _, shape in compiled} == wanted


def test_what_has_no_such_kernel_has_none_compiled(compiled):
    layers = {"a.q_proj": Int8Layer(1024, 1088), "a.o_proj": four_bit(1024, 1088)}
    for program in programs(layers):
        program()
    assert not compiled


def test_a_chunk_of_a_prompt_needs_no_other_kernel(layers, compiled):
    """The shape of tiles depends on the number of tokens; that of a whole chunk is there."""
    for program in programs(layers):
        program()
    shapes = {shape for _, shape in compiled}
    for kind, rows in warm_up._prompt_launches(layers, torch.bfloat16):
        assert linear_many.shape_on(rows, kind.columns, PREFILL_CHUNK) in shapes


def test_norms_and_gates_are_those_of_the_config(layers):
    llama = kinds(layers, config_of())
    assert (replace(KIND, norm="rms"), 3) in llama
    assert (replace(KIND, norm="rms", epilogue="gated"), 2) in llama
    settings = {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    gemma = kinds(layers, config_of("gemma2", **settings))
    assert (replace(KIND, norm="rms_plus_one"), 3) in gemma
    gated = replace(KIND, norm="rms_plus_one", epilogue="gated", gate="gelu_tanh")
    assert (gated, 2) in gemma


def test_joined_layers_are_launched_as_their_parts(layers):
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    joined = {f"{attention}.qkv_proj": four_bit(1536), f"{mlp}.gate_up_proj": four_bit(5632)}
    assert {(replace(KIND, norm="rms"), 3), (replace(KIND, norm="rms", epilogue="gated"), 2)} <= (
        kinds(joined, config_of("phi3"))
    )


def test_only_gated_launches_are_compiled_for_a_gate():
    h200 = SharedMemory(232_448, 233_472, 132)

    def defines(**settings):
        return specialise(replace(KIND, **settings), 2, 1, h200)[0]

    assert defines(gate="gelu") == defines(gate="silu")
    assert defines(gate="gelu", epilogue="gated") != defines(gate="silu", epilogue="gated")


def test_what_is_guessed_and_not_to_be_had_is_left_out(monkeypatch):
    """Llama 3.1 405B: no kernel holds 16,384 columns beside a norm."""
    h200, compiled = SharedMemory(232_448, 233_472, 132), []

    def compile_for(kind, count, max_tokens):
        specialise(kind, count, max_tokens, h200)
        compiled.append(kind)

    monkeypatch.setattr(warm_up, "compile_for", compile_for)
    monkeypatch.setattr(linear_many, "compiles_for", lambda target: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    layers = {"model.layers.0.self_attn.q_proj": four_bit(16_384, 16_384)}
    device = torch.device("cuda")
    warm_up.warm_up_kernels(config_of(), layers, device, torch.bfloat16)
    assert [kind.norm for kind in compiled] == ["none"]
