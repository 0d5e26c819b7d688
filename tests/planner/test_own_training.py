"""A step of `qtool finetune` as planned, against the modules that train, run without bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qtool.architecture import build_architecture
from qtool.checkpoint import Checkpoint
from qtool.exact.beside_plans import exact_request
from qtool.exact.peak import exact_peak
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import describe_model
from qtool.planner.records import Tuning, Workload
from qtool.planner.training import TrainingOptions, training_peak
from qtool.planner.training_loss import CHUNK_BYTES, chunk_tokens

LLAMA_8B = "meta-llama--Meta-Llama-3.1-8B"
# An H200, PyTorch's AdamW on 8-bit states, LoRA r 16 on all linear layers, dropout 0.05, 2 x 2,048
# tokens: torch.cuda.max_memory_allocated.
MEASURED_BYTES = 8_292_727_296

# Model, layers of it (None: all), workload, tuning.
CASES: dict[str, tuple[str, int | None, dict[str, Any], dict[str, Any]]] = {
    "8B": (LLAMA_8B, None, {}, {}),
    "INT8": (LLAMA_8B, 8, {"quant": "int8"}, {}),
    "no dropout": (LLAMA_8B, 8, {}, {"lora_dropout": 0.0}),
    "all kept": (LLAMA_8B, 8, {}, {"gradient_checkpointing": False}),
    "all kept, no dropout": (
        LLAMA_8B,
        8,
        {"batch": 1, "context": 1024},
        {"gradient_checkpointing": False, "lora_dropout": 0.0},
    ),
    "some layers": (LLAMA_8B, 8, {}, {"lora_targets": ("q_proj", "v_proj")}),
    "wide adapters": (LLAMA_8B, None, {"batch": 8, "context": 256}, {"lora_r": 256}),
    "bf16 adapters": (LLAMA_8B, 8, {"batch": 1, "context": 512}, {"adapter_dtype": "bf16"}),
    "long": (LLAMA_8B, None, {"batch": 1, "context": 16_384}, {}),
    "weights in pieces": ("meta-llama--Meta-Llama-3.1-405B", 2, {}, {}),
    "tied head": ("mlc--llama3_2_3b", None, {}, {"optimizer": "adamw-8bit"}),
    "the loss is the peak": ("Qwen--Qwen3-0.6B", None, {}, {}),
    "norms of queries and keys": ("Qwen--Qwen3-8B", 12, {}, {}),
    "biases": ("mlc--qwen2_7b", None, {}, {}),
    "fused projections": ("mlc--phi-3_5", None, {}, {}),
    "norms behind": ("mlc--olmo2_7b", 12, {}, {}),
    "soft caps": ("mlc--gemma2_2b", None, {}, {}),
    "windows": ("mlc--gemma3_1b_it", None, {}, {}),
    "float32 norms": ("tfdefault--opt", None, {}, {}),
    "lora": (LLAMA_8B, 8, {"mode": "lora", "quant": "bf16"}, {}),
    "lora, all kept": (
        LLAMA_8B,
        8,
        {"mode": "lora", "quant": "bf16"},
        {"gradient_checkpointing": False},
    ),
    "full": (LLAMA_8B, None, {"mode": "full", "quant": "bf16"}, {}),
    "full, float32": (LLAMA_8B, None, {"mode": "full", "quant": "fp32"}, {}),
    "full, 8-bit, all kept": (
        LLAMA_8B,
        None,
        {"mode": "full", "quant": "bf16"},
        {"gradient_checkpointing": False, "optimizer": "adamw-8bit"},
    ),
    "full, tied head": (
        "Qwen--Qwen3-0.6B",
        None,
        {"mode": "full", "quant": "bf16", "batch": 4},
        {},
    ),
}


def planned(test_data, name, layers, asked, tuning):
    config = json.loads((test_data / "configs" / name / "config.json").read_text())
    config = {
        **config,
        "dtype": "bfloat16",
        "num_hidden_layers": layers or config.get("num_hidden_layers"),
    }
    if layers and config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    asked = {"mode": "qlora", "quant": "nf4-dq", "context": 2048, "batch": 2, **asked}
    quant = asked.pop("quant")
    model = describe_model(Checkpoint.of_config("some/model", config))
    workload = Workload(**asked, tuning=Tuning(**tuning))
    return model, MemoryBudget.of(model, quant, workload).plan(workload)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_the_modules_allocate(test_data, case):
    model, plan = planned(test_data, *CASES[case])
    found = exact_peak(model.config, exact_request(model, plan)).allocated_peak_bytes
    workspace_bytes = plan.components["workspace"].bytes
    assert plan.allocated_peak_bytes - workspace_bytes == pytest.approx(found, rel=0.01)


def test_the_plan_is_what_was_measured(test_data):
    model, plan = planned(test_data, LLAMA_8B, None, {}, {"optimizer": "adamw-8bit"})
    assert plan.allocated_peak_bytes == pytest.approx(MEASURED_BYTES, rel=0.01)
    found = exact_peak(model.config, exact_request(model, plan)).allocated_peak_bytes
    assert found + plan.components["workspace"].bytes == pytest.approx(MEASURED_BYTES, rel=0.005)


def test_the_loss_takes_a_few_chunks_and_no_more_for_longer_batches(test_data):
    config = json.loads((test_data / "configs" / "Qwen--Qwen3-0.6B" / "config.json").read_text())
    architecture = build_architecture(config)

    def logits(batch):
        options = TrainingOptions(mode="qlora", runtime="qtool", batch=batch, context=2048)
        peak = training_peak(architecture, options)
        assert peak.moment == "loss"
        return peak.logits_bytes

    assert logits(1) == logits(2) <= 1.5 * CHUNK_BYTES
    assert chunk_tokens(1 << 40) == 1


def test_routers_with_a_loss_of_their_own_are_spoken_of(test_data):
    path = test_data / "configs" / "mistralai--Mixtral-8x7B-v0.1" / "config.json"
    architecture = build_architecture(json.loads(path.read_text()))
    options = TrainingOptions(mode="qlora", batch=1, context=512, runtime="qtool")
    assert any(
        "TRL computes all of it" in note for note in training_peak(architecture, options).notes
    )
