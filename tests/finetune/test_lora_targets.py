"""Targets that LoRA cannot adapt are refused, in words and with the nearest names."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.finetune.lora_layers import load_lora, wrap_with_lora
from qtool.finetune.lora_targets import check_lora_targets
from tests.runtime.packed_layers import make_layer


class Experts(nn.Module):
    """Four experts as one parameter, packed or not."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        data = (
            torch.randint(0, 255, (4, 32, 16), dtype=torch.uint8)
            if packed
            else torch.randn(4, 32, 16)
        )
        self.gate_up_proj = nn.Parameter(data, requires_grad=False)


class Block(nn.Module):
    def __init__(self, *, packed_experts: bool = True) -> None:
        super().__init__()
        self.q_proj = make_layer("nf4", 16, 16)
        self.up_proj = make_layer("int8", 16, 16)
        self.norm = nn.LayerNorm(16)
        self.experts = Experts(packed=packed_experts)


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(**settings), Block(**settings)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block.up_proj(block.q_proj(x))  # type: ignore[operator]
        return x


def refusal(model: nn.Module | None = None, **settings: Any) -> QtoolError:
    model = model or Model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(QtoolError) as caught:
        wrap_with_lora(model, peft.LoraConfig(r=2, **settings))
    assert [name for name, _ in model.named_modules()] == names, "the model is as it was"
    return caught.value


@pytest.mark.parametrize(
    "targets",
    ["all-linear", "All-Linear", ["q_proj"], ["layers.0.up_proj", "q_proj"], r".*\.1\.up_proj"],
)
def test_what_exists_passes(targets: Any) -> None:
    check_lora_targets(Model(), peft.LoraConfig(r=2, target_modules=targets))


def test_a_name_that_does_not_exist_gets_the_nearest() -> None:
    error = refusal(target_modules=["q_proj", "upp_proj"])
    assert error.kind == "usage"
    assert "'upp_proj' matches no layer" in error.message
    assert "names such as up_proj" in error.hint
    error = refusal(target_modules=["layers.7.q_prj"])
    assert "names such as q_proj" in error.hint
    error = refusal(target_modules=["something"])
    assert "names such as q_proj, up_proj" in error.hint


def test_the_head_is_not_offered() -> None:
    model = Model()
    model.lm_head = nn.Linear(8, 8)
    assert "lm_head" not in refusal(model, target_modules=["something"]).hint
    assert "lm_head" not in refusal(model, target_modules=["lm_haed"]).hint


def test_expressions() -> None:
    error = refusal(target_modules=r".*\.k_proj")
    assert error.kind == "usage"
    assert "match no layer" in error.message
    assert "no regular expression" in refusal(target_modules="*q_proj").message


def test_targets_that_leave_nothing() -> None:
    assert (
        "match no layer" in refusal(target_modules=["q_proj"], exclude_modules=["q_proj"]).message
    )
    assert "match no layer" in refusal(target_modules=["q_proj"], layers_to_transform=[9]).message
    error = refusal(nn.Sequential(nn.LayerNorm(4)), target_modules="all-linear")
    assert "no linear layer to adapt" in error.message


def test_modules_that_are_no_layers() -> None:
    error = refusal(target_modules=["norm"])
    assert error.kind == "usage"
    assert "'layers.0.norm' is a LayerNorm" in error.message


def test_packed_experts_are_no_silent_no_op() -> None:
    """Else PEFT builds adapters over the codes, and no product ever reads them."""
    for settings in (
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]},
        {"target_modules": ["experts"]},
        {"target_parameters": ["q_proj.weight"]},
    ):
        error = refusal(**settings)
        assert error.kind == "unsupported", settings
        assert "is packed" in error.message
    plain = Model(packed_experts=False)
    check_lora_targets(plain, peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj"]))


def test_a_parameter_that_does_not_exist() -> None:
    error = refusal(target_parameters=["experts.gate_proj"])
    assert error.kind == "usage"
    assert "names such as experts.gate_up_proj" in error.hint


def test_storage_of_codes_in_16_bit_counts_as_packed() -> None:
    class Params4bit(nn.Parameter):
        pass

    model = Model(packed_experts=False)
    experts: Any = model.layers[0].experts
    experts.gate_up_proj = Params4bit(torch.zeros(64, 1, dtype=torch.bfloat16), requires_grad=False)
    error = refusal(model, target_parameters=["layers.0.experts.gate_up_proj"])
    assert "layers.0.experts.gate_up_proj is packed" in error.message


def test_packed_layers_are_not_trained_whole() -> None:
    error = refusal(target_modules=["q_proj"], modules_to_save=["up_proj"])
    assert error.kind == "unsupported"
    assert "layers.0.up_proj is packed" in error.message
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    check_lora_targets(Model(), peft.LoraConfig(r=2, **settings))


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal", "pissa_niter_4"])
def test_initializations_from_the_weight_are_refused(how: Any) -> None:
    error = refusal(target_modules=["q_proj"], init_lora_weights=how)
    assert error.kind == "unsupported"
    assert how in error.message
    check_lora_targets(
        nn.Sequential(nn.Linear(4, 4)),
        peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=how),
    )


def test_an_adapter_of_another_model_is_refused(tmp_path: Any) -> None:
    other = nn.Sequential(nn.Linear(16, 16))
    made = peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["0"]))
    made.save_pretrained(tmp_path)
    with pytest.raises(QtoolError, match=r"'layers\.0' is a Block"):
        load_lora(Model(), tmp_path)
