"""`--exact` runs the very model that the plan beside it is for, and finds what is planned."""

from __future__ import annotations

import json

import pytest
from transformers.activations import ACT2CLS

from qtool.checkpoint import Checkpoint
from qtool.exact.beside_plans import exact_request
from qtool.exact.peak import exact_peak
from qtool.planner.mlp_activations import OTHERS
from qtool.planner.model import describe_model
from qtool.planner.records import Tuning
from tests.planner.plans import plan_of

LLAMA_8B = "meta-llama--Meta-Llama-3.1-8B"
LLAMA_7B = "mlc--llama2_7b"
GPT2 = "mirror--gpt2-xl"
FALCON = "tfdefault--falcon"
PHI_2 = {
    "model_type": "phi",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "vocab_size": 51200,
}
PHI_3 = "mlc--phi-3_5"  # switches between two sets of rotary frequencies at 4,096 tokens


def published(test_data, name, **changes):
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    return {**config, "dtype": "bfloat16", **changes}


def compared(config, quant, **workload):
    """Bytes that are planned for some layers, and those that they take when they run."""
    model = describe_model(Checkpoint.of_config("some/model", {**config, "num_hidden_layers": 4}))
    plan = plan_of(model, quant, **{"context": 1024, "batch": 2, **workload})
    workspace_bytes = plan.components["workspace"].bytes
    found = exact_peak(model.config, exact_request(model, plan)).allocated_peak_bytes
    return plan.allocated_peak_bytes - workspace_bytes, found


@pytest.mark.parametrize("runtime", ["qtool", "transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_float32_already_is_not_made_so_again(test_data, runtime, dtype):
    config = published(test_data, LLAMA_8B, dtype=dtype)
    planned, found = compared(config, "nf4-dq", mode="qlora", runtime=runtime)
    assert planned == pytest.approx(found, rel=0.01)


def test_only_what_preparing_adds_is_spoken_of(test_data):
    notes = {}
    for dtype in ("bfloat16", "float32"):
        config = published(test_data, LLAMA_8B, dtype=dtype)
        model = describe_model(Checkpoint.of_config("m", config))
        plan = plan_of(model, "nf4-dq", mode="qlora", runtime="transformers")
        notes[dtype] = [note for note in plan.notes if "prepare_model_for_kbit_training" in note]
    assert "+1.96 GiB" in notes["bfloat16"][0]
    assert notes["float32"] == []


@pytest.mark.parametrize(("name", "tokens"), [(LLAMA_8B, 512), (LLAMA_8B, 2048), (LLAMA_7B, 2048)])
def test_int8_layers_of_a_float32_model_compute_in_float32(test_data, name, tokens):
    config = published(test_data, name, dtype="float32")
    planned, found = compared(config, "int8", runtime="transformers", context=tokens)
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("activation", [*OTHERS, "gelu", "silu"])
def test_a_step_takes_what_its_activation_keeps(activation):
    if activation not in ACT2CLS:
        pytest.skip("BLOOM's own, which no other type has")
    config = {**PHI_2, "hidden_act": activation, "dtype": "bfloat16"}
    planned, found = compared(config, "nf4-dq", context=2048, mode="qlora")
    assert planned == pytest.approx(found, rel=0.025)
    planned, found = compared(config, "nf4-dq", context=2048, runtime="transformers")
    assert planned == pytest.approx(found, rel=0.01)


def test_a_gate_with_an_activation_that_is_spelled_out(test_data):
    config = published(test_data, LLAMA_8B, hidden_act="gelu_new")
    planned, found = compared(config, "nf4-dq", mode="qlora")
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("window", [None, 2047])
@pytest.mark.parametrize("tokens", [4095, 4096, 4097])
def test_a_text_that_is_computed_anew_lies_beside_its_old_cache(test_data, tokens, window):
    config = published(test_data, PHI_3, sliding_window=window)
    planned, found = compared(config, "bf16", context=tokens, runtime="transformers")
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize(("name", "tokens"), [(LLAMA_8B, 128), (LLAMA_8B, 2048), (GPT2, 512)])
def test_llm_int8_holds_on_to_inputs(test_data, name, tokens, recomputes):
    """By itself, so that checkpoints do not help: most of what such a step keeps."""
    workload = {"context": tokens, "tuning": Tuning(gradient_checkpointing=recomputes)}
    planned, found = compared(
        published(test_data, name), "int8", mode="qlora", runtime="transformers", **workload
    )
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("runtime", ["qtool", "transformers"])
def test_adapters_of_a_float32_model(test_data, runtime, recomputes):
    """The stream between its layers is in float32, too, and weights have copies in bf16."""
    config = published(test_data, LLAMA_8B, dtype="float32")
    tuning = Tuning(gradient_checkpointing=recomputes)
    planned, found = compared(config, "fp32", mode="lora", runtime=runtime, tuning=tuning)
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("recomputes", [True, False])
def test_copies_of_frozen_weights_go_with_their_layer(test_data, recomputes):
    """Falcon's linear layers are of a class of its own, which stays in float32."""
    tuning = Tuning(gradient_checkpointing=recomputes)
    planned, found = compared(
        published(test_data, FALCON), "nf4", mode="qlora", runtime="transformers", tuning=tuning
    )
    assert planned == pytest.approx(found, rel=0.01 if recomputes else 0.03)
