"""Whole plans for transformers + bitsandbytes against what an H200 reported."""

from __future__ import annotations

import json

import pytest

from qtool.planner.memory import MemoryBudget
from qtool.planner.model import open_model
from qtool.planner.records import Tuning, Workload

MIB = 1 << 20
FOLDERS = {"llama-3.2-3b": "mlc--llama3_2_3b", "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B"}


def measured_rows(test_data, kind, **wanted):
    lines = (test_data / "measured" / "h200_transformers_bitsandbytes.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    return [
        row
        for row in rows
        if row["kind"] == kind and all(row[key] == value for key, value in wanted.items())
    ]


def planned_peak_mib(test_data, row, quant, **workload):
    model = open_model(str(test_data / "configs" / FOLDERS[row["model"]] / "config.json"))
    asked = Workload(context=row["context"], batch=row["batch"], runtime="transformers", **workload)
    return MemoryBudget.of(model, quant, asked).plan(asked).allocated_peak_bytes / MIB


@pytest.mark.parametrize(
    ("quant", "num_rows", "tolerance", "short_tolerance"),
    [
        ("bf16", 10, 0.005, 0.01),
        ("nf4", 10, 0.005, 0.01),
        ("nf4-dq", 10, 0.005, 0.01),
        ("int8", 8, 0.02, 0.02),
    ],
)
def test_allocated_peak_of_generating(test_data, quant, num_rows, tolerance, short_tolerance):
    rows = measured_rows(test_data, "generate", quant=quant)
    assert len(rows) == num_rows
    for row in rows:
        rel = short_tolerance if row["context"] == 128 else tolerance
        found = planned_peak_mib(test_data, row, quant)
        assert found == pytest.approx(row["peak"], rel=rel), row


@pytest.mark.parametrize(
    ("checkpointing", "num_rows", "tolerance"), [(True, 10, 0.01), (False, 4, 0.03)]
)
def test_allocated_peak_of_a_qlora_step(test_data, checkpointing, num_rows, tolerance):
    rows = measured_rows(test_data, "qlora", gradient_checkpointing=checkpointing)
    assert len(rows) == num_rows
    for row in rows:
        tuning = Tuning(
            lora_r=row["lora_r"],
            lora_dropout=row["dropout"],
            gradient_checkpointing=checkpointing,
        )
        found = planned_peak_mib(test_data, row, "nf4-dq", mode="qlora", tuning=tuning)
        assert found == pytest.approx(row["peak"], rel=tolerance), row
