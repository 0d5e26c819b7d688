"""The compiled step on the processor with LoRA adapters: what PEFT's operations make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTunerLayer

from qtool.backends import cpu_attention, cpu_step
from qtool.runtime.decoders import host_tasks
from qtool.runtime.decoders.blocks import NotFusable
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.fused_adapters import BlockAdapters
from qtool.runtime.decoders.history import KeptHistory
from qtool.runtime.decoders.host_blocks import describe_host_network
from qtool.runtime.decoders.host_fused import HostNetwork, make_host_decoder, step_cache
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.decoders.adapted import OTHER_ADAPTERS, adapt
from tests.runtime.decoders.test_host_fused import (
    DTYPES,
    TOLERANCE,
    load,
    make,
    text,
    tokens,
    worst_difference,
)

# Model, format, settings of the adapter.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "nf4-dq", {}),
    ("llama", "int8", {"r": 16, "use_rslora": True}),
    ("llama", "fp32", {"target_modules": ["k_proj", "up_proj", "o_proj"]}),
    ("llama", "bf16", {"target_modules": ["o_proj"], "layers_to_transform": [1], "lora_alpha": 50}),
    ("llama", "nf4", {"r": 64, "target_modules": ["down_proj", "gate_proj"]}),
    ("qwen2", "nf4-dq", {"rank_pattern": {"v_proj": 24, "down_proj": 1}}),
    ("phi3", "nf4-dq", {"r": 256, "lora_alpha": 64}),
    ("gemma3_text", "nf4-dq", {"r": 8}),
    ("gemma2", "int8", {}),
]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits[0].float()
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "quant", "settings"), CASES)
def test_logits_are_those_of_the_adapted_model(
    name: str, quant: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model, ids = load(name, quant).model.to(dtype), tokens()
    without = logits_of(model, ids)
    adapt(model, **settings)
    expected = logits_of(model, ids)
    effect = (expected - without).abs().max() / expected.abs().max()
    assert effect > 2 * TOLERANCE[dtype], "such an adapter tests nothing"
    assert worst_difference(model, ids) <= TOLERANCE[dtype]


def test_matrices_of_the_models_own_dtype() -> None:
    """PEFT keeps them in float32 otherwise, and rounds less."""
    model = adapt(load().model).to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.bfloat16
    assert worst_difference(model, tokens()) <= TOLERANCE[torch.bfloat16]


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do products that are ready before the inner values are, however often it happens."""
    monkeypatch.setattr("qtool.runtime.decoders.host_step.MIN_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(host_tasks, "MIN_ITEM_ELEMENTS", 1)
    model, ids = adapt(load().model, r=16), tokens(60)
    before, logits = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3, 8):
            torch.set_num_threads(num_threads)
            network, cache = HostNetwork(model, 512, capacity=64), step_cache(model.config)
            with torch.inference_mode():
                network.prefill(ids[:, :3], 0, cache, in_chunks=True)
                steps = [network.step(int(ids[0, at]), at, cache).clone() for at in range(3, 60)]
            logits.append(torch.cat(steps))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("name", ["tinylm-19m", "TinyStories-656K-hf"])
def test_greedy_texts_of_trained_models_are_those_of_peft(
    models: Path, name: str, quant: str
) -> None:
    """64 tokens in float32."""
    options = LoadOptions(
        quant=None if quant == "bf16" else quant,  # type: ignore[arg-type]
        compute_dtype="float32",
        device="cpu",
    )
    with load_model(str(models / name), options) as loaded:
        ids = loaded.tokenizer("Once upon a time there was", return_tensors="pt").input_ids
        without = text(make(loaded), ids, 64)
        adapt(loaded.model, std=0.03, r=16, lora_alpha=32)
        decoder = choose_decoder(loaded, 128)
        assert decoder.path == "fused"
        made = text(decoder, ids, 64)
        assert made == text(make(loaded, "eager"), ids, 64)
        assert made != without, "such an adapter tests nothing"


@pytest.mark.parametrize("name", ["slm4096-gpt2-hf", "tinymoe-6m", "stories260K-hf"])
def test_other_models_run_with_pefts_layers(models: Path, name: str) -> None:
    options = LoadOptions(compute_dtype="float32", device="cpu")
    with load_model(str(models / name), options) as loaded:
        adapt(loaded.model, target_modules=r".*(attn|self_attn)\.(c_attn|q_proj)")
        decoder = choose_decoder(loaded, 64)
        assert decoder.path == "eager"
        assert "fused step" in decoder.path_reason or "does not fit" in decoder.path_reason


def test_an_adapter_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_of(network: Any) -> list[BlockAdapters]:
        return [BlockAdapters(None, None, None, None) for _ in network.blocks]

    monkeypatch.setattr(host_tasks, "adapters_of", none_of)
    loaded = load()
    adapt(loaded.model, std=0.1)
    with pytest.raises(NotFusable, match="the fused step gives other logits at token"):
        make_host_decoder(loaded, capacity=64, prefill_chunk=512)


def test_adapters_that_are_switched_off_are_not_there() -> None:
    loaded = load()
    expected = text(make(loaded), tokens(20))
    adapt(loaded.model)
    assert text(make(loaded), tokens(20)) != expected
    for module in loaded.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert text(make(loaded), tokens(20)) == expected


def test_no_operator_is_compiled_for_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    make(loaded)
    adapt(loaded.model)

    def compile_it(function: Any) -> Any:
        raise AssertionError(f"{function.__qualname__} was not compiled before")

    for module in (cpu_attention, cpu_step):
        monkeypatch.setattr(module, "operator", compile_it)
    make(loaded)


def test_a_kept_decoder_follows_what_becomes_of_the_adapter() -> None:
    """Of which it has copies."""
    loaded, kept = load(), KeptHistory()
    layers = [it for it in adapt(loaded.model).modules() if isinstance(it, BaseTunerLayer)]

    def made() -> list[int]:
        with kept.borrow(loaded, DecoderOptions(path="fused")) as history:
            return list(history.answer(tokens(20)[0].tolist(), Sampling(), 20))

    adapted = made()
    assert adapted == text(make(loaded), tokens(20), 20)
    for layer in layers:
        layer.enable_adapters(False)
    without = made()
    assert without == text(make(loaded), tokens(20), 20) != adapted
    for layer in layers:
        layer.enable_adapters(True)
    assert made() == adapted
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.mul_(-3)
    assert made() == text(make(loaded), tokens(20), 20) != adapted


# -- what it does not do ------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "reason"), OTHER_ADAPTERS)
def test_other_adapters_are_run_by_peft(settings: dict[str, Any], reason: str) -> None:
    loaded = load()
    adapt(loaded.model, **settings)
    decoder = choose_decoder(loaded, 64)
    assert decoder.path == "eager"
    assert decoder.path_reason.startswith(f"{reason};")


def test_other_kinds_of_layers_are_refused_by_name() -> None:
    import peft

    model = load().model
    peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(NotFusable, match="a layer is peft's Linear"):
        describe_host_network(model)


def test_several_adapters_at_once_are_refused() -> None:
    model = adapt(load().model)
    layer = model.model.layers[1].mlp.up_proj
    for part in (layer.lora_A, layer.lora_B):
        part["other"] = part["default"]
    layer._active_adapter = ["default", "other"]
    with pytest.raises(NotFusable, match="a layer has several adapters at once"):
        describe_host_network(model)
