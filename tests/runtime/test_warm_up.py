"""Which kernels are made ready while weights load, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cupy_kernels import linear_many
from cupy_kernels.launch import Gpu
from cupy_kernels.linear_few import LinearKind
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
    monkeypatch.setattr(linear_many, "current_gpu", lambda: Gpu(132, can_overlap=True))
    monkeypatch.setattr(linear_many, "_load", lambda kind, shape: found.append((kind, shape)))
    return found


def programs(layers):
    return warm_up._programs(layers, torch.bfloat16, adapted=False)


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
