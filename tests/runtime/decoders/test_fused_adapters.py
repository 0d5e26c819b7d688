"""The fused path with LoRA adapters, without a GPU: PEFT's own logits come out of its launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cupy", exc_type=ImportError)
pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTunerLayer

from qtool.runtime.decoders import fused
from qtool.runtime.decoders.blocks import NotFusable, describe_network
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.fused_adapters import BlockAdapters, adapters_of
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.output_head import quantize_head
from tests.runtime.decoders.adapted import OTHER_ADAPTERS, adapt
from tests.runtime.decoders.cpu_launches import launches_on_the_cpu
from tests.runtime.decoders.test_fused import (
    CAPACITY,
    OWN_PROMPTS,
    PROMPT_TOKENS,
    STEPS,
    TOLERANCES,
    expected_logits,
    load,
    prepared,
    tokens,
)

# Model, format, settings of the adapter.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "nf4-dq", {}),
    ("llama", "int8", {"r": 16, "use_rslora": True}),
    ("llama", "fp16", {"target_modules": ["k_proj", "up_proj", "o_proj"]}),
    ("llama", "fp16", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("qwen2", "nf4-dq", {"rank_pattern": {"v_proj": 24, "down_proj": 1}}),
    ("phi3", "nf4-dq", {}),
    ("gemma3_text", "nf4-dq", {"r": 8}),
    ("gemma2", "fp16", {}),
]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with launches_on_the_cpu(), torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "quant", "settings"), CASES)
def test_logits_are_those_of_the_adapted_model(
    name: str, quant: str, settings: dict[str, Any]
) -> None:
    model = load(name, quant)
    batch = 2 if quant == "fp16" else 1
    ids = tokens(batch, PROMPT_TOKENS + STEPS)
    without = [logits.clone() for logits in expected_logits(model, ids)]
    adapt(model, **settings)
    network, cache = prepared(model, batch)
    assert bool(network.prompt_reason) == (name in OWN_PROMPTS)
    found = [network.prefill(ids[:, :PROMPT_TOKENS], 0, cache, in_chunks=True).clone()]
    for at in range(PROMPT_TOKENS, ids.shape[1]):
        position = torch.full((batch, 1), at)
        found.append(network.logits(ids[:, at : at + 1], position, cache).clone())
    for made, expected, plain in zip(found, expected_logits(model, ids), without, strict=True):
        largest = expected.abs().max()
        assert (made.float() - expected.float()).abs().max() <= TOLERANCES[quant] * largest
        effect = (plain.float() - expected.float()).abs().max()
        assert effect > 2 * TOLERANCES[quant] * largest, "such an adapter tests nothing"


def test_a_packed_head_goes_with_an_adapter() -> None:
    model = load("llama", "nf4-dq")
    quantize_head(model, "int8")
    adapt(model)
    assert describe_network(model).head.kind.format == "int8"
    prepared(model)


def test_an_adapter_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_of(network: Any) -> list[BlockAdapters]:
        return [BlockAdapters(None, None, None, None) for _ in network.blocks]

    monkeypatch.setattr(fused, "adapters_of", none_of)
    with pytest.raises(CaptureFailed, match="other logits at token"):
        prepared(adapt(load("llama", "nf4-dq"), std=0.1))


@pytest.mark.parametrize("name", ["tinylm-19m", "TinyStories-656K-hf"])
def test_texts_of_trained_models_part_only_where_two_tokens_are_close(
    models: Path, name: str
) -> None:
    options = LoadOptions(quant="nf4-dq", compute_dtype="bfloat16", device="cpu")
    loaded = load_model(str(models / name), options)
    model = adapt(loaded.model, std=0.03)
    model.lm_head.__class__ = torch.nn.Linear  # of a model on a GPU it is one
    network, cache = prepared(model)
    ids = loaded.tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    expected = logits_after(model, ids)
    found = network.prefill(ids, 0, cache, in_chunks=True)
    for at in range(ids.shape[1], CAPACITY):
        found, expected = found[0].float(), expected[0].float()
        error = (found - expected).abs().max()
        best = expected.topk(2).values
        assert found.argmax() == expected.argmax() or best[0] - best[1] < 2 * error, at
        ids = torch.cat([ids, expected.argmax()[None, None]], dim=1)
        expected = logits_after(model, ids)
        found = network.logits(ids[:, -1:], torch.full((1, 1), at), cache)


def logits_after(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, -1]
    return logits


# -- what kernels are told ------------------------------------------------------------------------


def test_layers_that_share_an_input_have_one_launch() -> None:
    model = adapt(load("llama"), target_modules=["q_proj", "v_proj", "down_proj"])
    (first, *_) = adapters_of(describe_network(model))
    group = first.query_key_value
    assert group is not None and group.a.shape == (16, 256)
    assert [weight.first for weight in group.weights] == [0, 0, 8]
    assert [weight.rank for weight in group.weights] == [8, 0, 8]
    assert group.scales.tolist() == [2.0] * 5 + [0.0] * 3 + [2.0] * 5 + [0.0] * 3
    assert (first.output, first.gate_up) == (None, None)
    assert first.down is not None and first.down.a.shape == (8, 512)


def test_halves_of_a_layer_share_its_inner_values() -> None:
    (first, *_) = adapters_of(describe_network(adapt(load("phi3"))))
    assert first.gate_up is not None and first.gate_up.a.shape[0] == 8
    gate, up = first.gate_up.parts
    assert gate is not None and up is not None and gate.first == up.first == 0
    assert not torch.equal(gate.b, up.b)


def test_matrices_are_rounded_to_what_the_model_computes_in() -> None:
    model = adapt(load("llama", "nf4-dq"))
    layer = model.model.layers[0].self_attn.o_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    (first, *_) = adapters_of(describe_network(model))
    assert first.output is not None
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = (layer(x) - layer.base_layer(x)).float()
    assert expected.abs().max() > 0
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = 2 * (x.double() @ a.double().T) @ b.double().T
    out = torch.zeros(1, 256, dtype=torch.bfloat16)
    first.output.add(x, (out,))
    # Roundings of A, B, the inner values and the result: 2**-9 each, and most of them average out.
    assert (out.double() - exact).norm() <= 0.01 * exact.norm()


# -- what it does not do --------------------------------------------------------------------------


def refusal(model: Any) -> str:
    with pytest.raises(NotFusable) as caught:
        describe_network(model)
    return str(caught.value)


@pytest.mark.parametrize(("settings", "reason"), OTHER_ADAPTERS)
def test_other_adapters_are_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    assert refusal(adapt(load("llama"), **settings)) == reason


def test_other_kinds_of_layers_are_refused_by_name() -> None:
    import peft

    model = load("llama")
    peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    assert refusal(model) == "a layer is peft's Linear"


def test_several_adapters_at_once_are_refused() -> None:
    model = adapt(load("llama"))
    layer = model.model.layers[1].mlp.up_proj
    for part in (layer.lora_A, layer.lora_B):
        part["other"] = part["default"]
    layer._active_adapter = ["default", "other"]
    assert refusal(model) == "a layer has several adapters at once"


def test_adapters_that_are_switched_off_are_not_there() -> None:
    model = adapt(load("llama"))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert not any(block.groups for block in adapters_of(describe_network(model)))
    prepared(model)
