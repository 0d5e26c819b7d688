"""PEFT's LoRA over packed layers: equal to its own chain, merged, unmerged, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qtool.errors import QtoolError
from qtool.finetune import lora_layers
from qtool.finetune.lora_layers import QLoraLinear, load_lora, wrap_with_lora
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders, load_stock
from tests.runtime.packed_layers import QUANTS, make_layer, relative_error

VOCABULARY = 64


class Pair(nn.Module):
    """Two packed layers, the first with a bias."""

    def __init__(self, quant: str) -> None:
        super().__init__()
        self.first = make_layer(quant, 48, 64, bias=True, seed=1)
        self.second = make_layer(quant, 37, 48, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def config(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["first", "second"], **settings})


def randomize(model: nn.Module, seed: int = 9, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=std, generator=generator)


def wrapped_pair(quant: str = "nf4-dq", **settings: Any) -> Any:
    model = wrap_with_lora(Pair(quant), config(**settings))
    randomize(model)
    return model


def layers_of(model: Any) -> list[QLoraLinear]:
    return [module for module in model.modules() if isinstance(module, QLoraLinear)]


def packed_bytes(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, LinearInt8))
        for part, tensor in module.state_dict().items()
    }


def assert_same_bytes(model: Any, expected: dict[str, Tensor]) -> None:
    found = packed_bytes(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that went through the one step of autograd."""
    calls: list[int] = []
    step = lora_layers.lora_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(lora_layers, "lora_linear", counted)
    return calls


# -- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("rslora", [True, False])
def test_equals_the_chain_of_peft(quant: str, rslora: bool, fused_calls: list[int]) -> None:
    layer = layers_of(wrapped_pair(quant, use_rslora=rslora, lora_alpha=6))[0]
    x = torch.randn(2, 40, 64)
    results = []
    for forward in (layer.forward, lambda x: PeftLinear.forward(layer, x)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = forward(leaf)
        out.square().sum().backward()
        adapter = (p.grad.clone() for _, p in layer.named_parameters() if p.requires_grad)
        results.append([out.detach(), leaf.grad, *adapter])
    assert len(fused_calls) == 1
    assert len(results[0]) == 4
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-6


def test_equals_the_chain_of_peft_under_autocast(fused_calls: list[int]) -> None:
    layer = layers_of(wrapped_pair())[0]
    x = torch.randn(2, 40, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), PeftLinear.forward(layer, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_error(found.detach(), expected.detach()) < 5e-3
    assert len(fused_calls) == 1


def test_dropout_only_while_training() -> None:
    model = wrapped_pair(lora_dropout=0.5)
    x = torch.randn(4, 64)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x))


def add_second_adapter(model: Any) -> None:
    model.add_adapter("other", config())
    randomize(model, seed=4)


def test_what_is_not_plain_takes_the_chain(fused_calls: list[int]) -> None:
    x = torch.randn(3, 64)
    cases: dict[str, Any] = {
        "disabled": wrapped_pair(),
        "merged": wrapped_pair(),
        "two adapters": wrapped_pair(),
        "dora": wrapped_pair(use_dora=True),
        "bias of the adapter": wrapped_pair(lora_bias=True, target_modules=["first"]),
        "trained bias of the base": wrapped_pair(bias="all", target_modules=["first"]),
        "hooks": wrapped_pair(),
    }
    cases["merged"].merge_adapter()
    add_second_adapter(cases["two adapters"])
    cases["two adapters"].base_model.set_adapter(["default", "other"])
    for layer in layers_of(cases["hooks"]):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    for name, model in cases.items():
        with model.disable_adapter() if name == "disabled" else torch.enable_grad():
            model(x)
        assert not fused_calls, name
    wrapped_pair()(x)
    assert len(fused_calls) == 2


def test_several_adapters() -> None:
    model = wrapped_pair()
    add_second_adapter(model)
    x = torch.randn(3, 64)
    with model.disable_adapter():
        base = model(x)
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = model(x)
    assert not torch.allclose(results["default"], results["other"])
    assert not torch.allclose(results["default"], base)
    model.set_adapter("default")
    assert torch.equal(model(x), results["default"])


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_dora_reads_the_dequantized_weight(quant: str) -> None:
    model = wrapped_pair(quant, use_dora=True, target_modules=["second"])
    plain = Pair(quant)
    weight = plain.second.dequantize().float()
    plain.second = nn.Linear(48, 37, bias=False)
    plain.second.weight.data = weight
    expected = peft.get_peft_model(plain, config(use_dora=True, target_modules=["second"]))
    randomize(expected)
    x = torch.randn(5, 64)
    assert relative_error(model(x).detach(), expected(x).detach()) < 1e-3
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_variants_that_need_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="unsupported variant"):
        wrap_with_lora(Pair("nf4"), config(velora_config=peft.VeloraConfig()))


def tiny_llama(quant: str) -> Any:
    from qtool.runtime.random_model import build_random_model

    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    return build_random_model(shape.to_dict(), quant, device="cpu").model  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_training_lowers_the_loss_and_changes_adapters_alone(
    quant: str, use_reentrant: bool | None, fused_calls: list[int]
) -> None:
    torch.manual_seed(0)
    network = tiny_llama(quant)
    if use_reentrant is not None:
        network.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        network.enable_input_require_grads()
    model = wrap_with_lora(
        network, config(r=8, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    ).train()
    before = packed_bytes(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    ids = torch.randint(0, VOCABULARY, (2, 48))
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert fused_calls
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert_same_bytes(model, before)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


# -- merging ------------------------------------------------------------------------------------


def summed(layer: QLoraLinear, *names: str) -> Tensor:
    weight = layer.base_layer.dequantize().float()
    for name in names:
        weight = weight + layer.get_delta_weight(name).float()
    return weight.detach()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("safe", [True, False])
def test_merging_packs_the_sum_and_unmerging_gives_every_byte_back(quant: str, safe: bool) -> None:
    model = wrapped_pair(quant)
    before = packed_bytes(model)
    expected = {}
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        twin = copy.deepcopy(layer.base_layer)
        twin.requantize(summed(layer, "default"))
        expected[name] = twin
    model.merge_adapter(safe_merge=safe)
    for name, twin in expected.items():
        base = getattr(model.base_model.model, name).base_layer
        assert torch.equal(base.dequantize(), twin.dequantize()), name
        assert not torch.equal(base.weight, before[f"base_model.model.{name}.base_layer.weight"])
    x = torch.randn(3, 64)
    merged = model(x)
    assert torch.equal(merged, expected["second"](torch.tanh(expected["first"](x))))
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    assert all(layer._before is None for layer in layers_of(model))
    # Packing rounds, by less than the adapter adds.
    effect = relative_error(base_only(model, x), model(x).detach())
    assert 0 < relative_error(merged.detach(), model(x).detach()) < effect


def base_only(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter(), torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def test_a_second_adapter_is_added_to_the_weight_from_before() -> None:
    model = wrapped_pair()
    before = packed_bytes(model)
    add_second_adapter(model)
    layer = layers_of(model)[0]
    twin = copy.deepcopy(layer.base_layer)
    twin.requantize(summed(layer, "default", "other"))
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert layer.merged_adapters == ["default", "other"]
    assert torch.equal(layer.base_layer.weight, twin.weight)
    with pytest.warns(UserWarning, match="nothing to do"):
        layer.merge(adapter_names=["other"])
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    with pytest.warns(UserWarning, match="Nothing to do"):
        layer.unmerge()


def test_disabling_adapters_unmerges() -> None:
    model = wrapped_pair()
    before = packed_bytes(model)
    x = torch.randn(3, 64)
    base = base_only(model, x)
    model.merge_adapter()
    assert torch.equal(base_only(model, x), base)
    assert_same_bytes(model, before)


def test_unloading_leaves_packed_layers() -> None:
    model = wrapped_pair("int8")
    x = torch.randn(3, 64)
    model.merge_adapter()
    expected = model(x)
    model.unmerge_adapter()
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain.first) is LinearInt8
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(safe: bool, value: float) -> None:
    model = wrapped_pair()
    add_second_adapter(model)
    model.merge_adapter(["default"])
    merged = packed_bytes(model)
    layer = layers_of(model)[0]
    layer.lora_B["other"].weight.data[3, 1] = value
    with pytest.raises(QtoolError, match="first: merging gives values that are not finite"):
        model.merge_adapter(["other"], safe_merge=safe)
    assert layer.merged_adapters == ["default"]
    assert_same_bytes(model, merged)


def test_a_bias_of_the_adapter_is_merged_and_taken_back() -> None:
    model = wrapped_pair(lora_bias=True, target_modules=["first"])
    before = packed_bytes(model)
    layer = layers_of(model)[0]
    layer.lora_B["default"].bias.data.normal_()
    bias = layer.base_layer.bias.detach().clone()
    model.merge_adapter()
    added = layer.lora_B["default"].bias * layer.scaling["default"]
    assert torch.allclose(layer.base_layer.bias, bias + added.to(bias))
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    layer.lora_B["default"].bias.data[0] = float("nan")
    with pytest.raises(QtoolError, match="not finite"):
        model.merge_adapter()
    assert_same_bytes(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says beforehand what we refuse here
        without = wrapped_pair(lora_bias=True, target_modules=["second"])
    with pytest.raises(QtoolError, match="has none to add it to"):
        without.merge_adapter()


def test_dora_merges_alone() -> None:
    model = wrapped_pair("int8", use_dora=True)
    before = packed_bytes(model)
    x = torch.randn(3, 64)
    expected = model(x).detach()
    model.merge_adapter()
    assert relative_error(model(x).detach(), expected) < 0.02
    model.unmerge_adapter()
    assert_same_bytes(model, before)
    assert torch.equal(model(x), expected)
    add_second_adapter(model)
    with pytest.raises(QtoolError, match="merges with no other adapter"):
        model.merge_adapter(["default", "other"])


# -- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedFolders]:
    yield PackedFolders(test_data / "models", tmp_path_factory.mktemp("packed"))


MODEL = "tinylm-19m"
IDS = torch.arange(3, 43)[None]


def our_model(folder: Path) -> Any:
    return load_model(str(folder), LoadOptions(device="cpu", compute_dtype="float32")).model


def stock_model(folder: Path) -> Any:
    """bitsandbytes' layers, computing in float32 as ours."""
    from bitsandbytes import nn as bnb_nn

    model = nn.Module.float(load_stock(folder))  # transformers refuses, packed weights do not
    packed = [m for m in model.modules() if isinstance(m, (bnb_nn.Linear4bit, bnb_nn.Linear8bitLt))]
    assert packed
    for module in packed:
        module.compute_dtype = torch.float32
        module.compute_type_is_set = True
        module.support_avx512bf16_for_cpu = False  # it would repack the weight in its place
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_adapters_pass_between_us_and_bitsandbytes(
    folders: PackedFolders, tmp_path: Path, quant: str, ours_first: bool
) -> None:
    """In both directions, over the same bytes."""
    folder = folders.by_qtool(MODEL, quant)
    ours, stock = our_model(folder), stock_model(folder)
    base = logits(ours)
    settings = config(target_modules="all-linear", r=8, lora_alpha=16, task_type="CAUSAL_LM")
    made = wrap_with_lora(ours, settings) if ours_first else peft.get_peft_model(stock, settings)
    randomize(made)
    made.eval().save_pretrained(tmp_path / "adapter")
    if ours_first:
        other = peft.PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    else:
        other = load_lora(ours, tmp_path / "adapter")
        assert layers_of(other)
        assert not any(parameter.requires_grad for parameter in other.parameters())
    expected = logits(made)
    effect = relative_error(base, expected)
    # bitsandbytes rounds activations to 8 bits for int8 weights, and does not round what it
    # dequantizes of 4-bit ones to bfloat16.
    tolerance = 0.1 if quant == "int8" else 5e-3
    found = logits(other)
    assert relative_error(found, expected) < tolerance < effect / 2


def test_adapters_of_plain_models_load_here(folders: PackedFolders, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders.sources / MODEL, dtype=torch.float32)
    assert isinstance(plain, LlamaForCausalLM)
    made = peft.get_peft_model(plain, config(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(made)
    made.save_pretrained(tmp_path / "adapter")
    ours = load_lora(our_model(folders.by_qtool(MODEL, "nf4")), tmp_path / "adapter")
    for name, module in ours.base_model.model.named_modules():
        if isinstance(module, QLoraLinear):
            target = made.base_model.model.get_submodule(name).base_layer
            target.weight.data = module.base_layer.dequantize().float()
    assert relative_error(logits(ours), logits(made)) < 1e-5
    again = load_lora(
        our_model(folders.by_qtool(MODEL, "nf4")), tmp_path / "adapter", is_trainable=True
    )
    assert all("lora_" in n for n, p in again.named_parameters() if p.requires_grad)
    assert torch.equal(logits(again.eval()), logits(ours))


def test_layers_kept_the_other_way_round(folders: PackedFolders, tmp_path: Path) -> None:
    """GPT-2's Conv1D: a config says fan_in_fan_out, our packed layer is [out, in] all the same."""
    source = folders.sources / "slm4096-gpt2-hf"
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    settings = config(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    made = peft.get_peft_model(plain, settings)
    randomize(made)
    made.save_pretrained(tmp_path / "adapter")
    ours = load_lora(our_model(folders.by_qtool("slm4096-gpt2-hf", "int8")), tmp_path / "adapter")
    for name, module in ours.base_model.model.named_modules():
        if isinstance(module, (Linear4bit, LinearInt8)) and "base_layer" not in name:
            made.base_model.model.get_submodule(name).weight.data = module.dequantize().float().T
        if isinstance(module, QLoraLinear):
            target = made.base_model.model.get_submodule(name).base_layer
            target.weight.data = module.base_layer.dequantize().float().T
    assert relative_error(logits(ours), logits(made)) < 1e-5
    before = packed_bytes(ours)
    expected = logits(ours)
    ours.merge_adapter()
    assert relative_error(logits(ours), expected) < 0.05
    ours.unmerge_adapter()
    assert_same_bytes(ours, before)
