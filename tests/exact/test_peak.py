"""Runs on the meta device against what transformers, bitsandbytes and PEFT took on a GPU."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qtool.errors import QtoolError
from qtool.exact.peak import exact_peak
from qtool.exact.records import ExactRequest, LoraAdapters

MIB = 1 << 20
FOLDERS = {"llama-3.2-3b": "mlc--llama3_2_3b", "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B"}
TRAINING_WORKSPACES_MIB = 64  # cuBLAS takes 32 MiB per thread, and backward has its own

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def rows(test_data, kind, quant=None):
    lines = (test_data / "measured" / "h200_transformers_bitsandbytes.jsonl").read_text()
    found = [json.loads(line) for line in lines.splitlines()]
    return [row for row in found if row["kind"] == kind and row.get("quant") == quant]


def config_of(test_data, row):
    return json.loads((test_data / "configs" / FOLDERS[row["model"]] / "config.json").read_text())


def outliers(config, tokens):
    """The share of an MLP's columns with a product beyond 6 where weights are random.

    Gate and up are normal with sqrt(hidden) times the deviation of the weights, 0.02.
    """
    deviation = 0.02 * math.sqrt(config["hidden_size"])
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    gate = torch.nn.functional.silu(z * deviation).abs().clamp_min(1e-9)
    beyond = torch.erfc(6 / gate / deviation / math.sqrt(2))
    probability = float((density * beyond).sum() * (z[1] - z[0]))
    return 1 - (1 - probability) ** tokens


@pytest.mark.parametrize(
    ("quant", "count", "tolerance"),
    [("bf16", 10, 0.0005), ("nf4", 10, 0.0005), ("nf4-dq", 10, 0.0005), ("int8", 8, 0.005)],
)
def test_prefill_takes_what_it_took_on_a_gpu(test_data, quant, count, tolerance):
    """Beyond weights and workspace, which `alloc` holds, to a share of the whole.

    The INT8 rows fit float16 activations, and no other dtype.
    """
    measured = rows(test_data, "generate", quant)
    assert len(measured) == count
    for row in measured:
        config, tokens = config_of(test_data, row), row["batch"] * row["context"]
        request = ExactRequest(
            quant=quant,
            runtime="transformers",
            context=row["context"],
            batch=row["batch"],
            compute_dtype="fp16" if quant == "int8" else "bf16",
            int8_outliers={"down_proj": outliers(config, tokens)},
        )
        peak = exact_peak(config, request)
        found_mib = (peak.allocated_peak_bytes - peak.weights_bytes) / MIB
        limit_mib = tolerance * row["peak"]
        assert found_mib == pytest.approx(row["peak"] - row["alloc"], abs=limit_mib), row


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_qlora_takes_what_it_took_on_a_gpu(test_data, gradient_checkpointing):
    measured = [
        row
        for row in rows(test_data, "qlora")
        if row["gradient_checkpointing"] == gradient_checkpointing
    ]
    assert len(measured) == (10 if gradient_checkpointing else 4)
    for row in measured[::2]:
        request = ExactRequest(
            quant="nf4-dq",
            mode="qlora",
            runtime="transformers",
            context=row["context"],
            batch=row["batch"],
            gradient_checkpointing=gradient_checkpointing,
        )
        peak = exact_peak(config_of(test_data, row), request)
        found_mib = peak.allocated_peak_bytes / MIB + TRAINING_WORKSPACES_MIB
        tolerance = 0.002 if gradient_checkpointing else 0.03
        assert found_mib == pytest.approx(row["peak"], rel=tolerance), row


@pytest.mark.parametrize("mode", ["generate", "qlora", "lora", "full"])
def test_the_breakdown_adds_up(mode):
    quant = "nf4-dq" if mode in ("generate", "qlora") else "bf16"
    config = {**TINY, "vocab_size": 20_000}
    peak = exact_peak(config, ExactRequest(quant=quant, mode=mode, context=512, batch=2))
    assert sum(peak.breakdown.values()) == peak.allocated_peak_bytes
    assert peak.breakdown["weights"] == peak.weights_bytes
    expected = {
        "generate": {"kv_cache"},
        "qlora": {"adapters", "optimizer", "logits"},
        "lora": {"adapters", "optimizer", "logits"},
        "full": {"optimizer", "logits"},
    }
    assert expected[mode] <= peak.breakdown.keys()


def test_the_peak_names_its_moment():
    config = {**TINY, "intermediate_size": 4000}
    peak = exact_peak(config, ExactRequest(quant="bf16", context=512))
    assert peak.at_peak.startswith("prefill model.layers.2.mlp")


def test_weights_are_those_of_each_runtime():
    sizes = {
        (quant, runtime): exact_peak(
            TINY, ExactRequest(quant=quant, runtime=runtime, context=16)
        ).weights_bytes
        for quant in ("bf16", "int8", "nf4", "nf4-dq")
        for runtime in ("qtool", "transformers")
    }
    for runtime in ("qtool", "transformers"):
        by_quant = [sizes[quant, runtime] for quant in ("bf16", "int8", "nf4", "nf4-dq")]
        assert by_quant == sorted(by_quant, reverse=True)
    assert sizes["bf16", "qtool"] == sizes["bf16", "transformers"]


def test_float32_with_grouped_heads_makes_the_matrix():
    """No fused kernel takes both, so memory grows with the square of the context."""
    fused, matrix = (
        exact_peak(TINY, ExactRequest(quant=quant, runtime="transformers", context=2048))
        for quant in ("bf16", "fp32")
    )
    matrix_bytes = 4 * 2048 * 2048 * 4
    assert matrix.allocated_peak_bytes > 2 * fused.allocated_peak_bytes + matrix_bytes / 2


def test_training_options_change_what_they_name():
    def peak(**options):
        mode = options.pop("mode", "qlora")
        quant = "nf4" if mode == "qlora" else "bf16"
        return exact_peak(TINY, ExactRequest(quant=quant, mode=mode, context=512, **options))

    base = peak()
    assert peak(gradient_checkpointing=False).allocated_peak_bytes > base.allocated_peak_bytes
    wide = peak(lora=LoraAdapters(r=64)).breakdown["adapters"]
    assert wide == pytest.approx(4 * base.breakdown["adapters"], rel=0.01)
    half = peak(lora=LoraAdapters(dtype="bf16")).breakdown["adapters"]
    assert half == pytest.approx(base.breakdown["adapters"] / 2, rel=0.01)
    one = peak(lora=LoraAdapters(targets=("q_proj",))).breakdown["adapters"]
    assert 0 < one < base.breakdown["adapters"] / 4
    full, packed = (peak(mode="full", optimizer=name) for name in ("adamw", "adamw_8bit"))
    assert packed.breakdown["optimizer"] < full.breakdown["optimizer"]
    dropped = peak(lora=LoraAdapters(dropout=0), gradient_checkpointing=False)
    kept = peak(gradient_checkpointing=False)
    assert dropped.allocated_peak_bytes < kept.allocated_peak_bytes


@pytest.mark.parametrize(
    ("config", "request_", "kind", "words"),
    [
        ({**TINY, "model_type": "molmo"}, ExactRequest("bf16"), "unsupported", "molmo"),
        ({**TINY, "hidden_act": "nothing"}, ExactRequest("bf16"), "bad_file", "LlamaForCausalLM"),
        (TINY, ExactRequest("fp8"), "unsupported", "fp8"),
        (TINY, ExactRequest("nf4", mode="full"), "usage", "nf4"),
    ],
)
def test_what_cannot_run_is_said_with_a_hint(config, request_, kind, words):
    with pytest.raises(QtoolError) as caught:
        exact_peak(config, request_, "some/model")
    assert caught.value.kind == kind
    assert words in caught.value.message
    assert caught.value.hint


def test_missing_peft_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QtoolError, match="peft") as caught:
        exact_peak(TINY, ExactRequest("bf16", mode="lora", context=16))
    assert caught.value.hint == "pip install peft"
