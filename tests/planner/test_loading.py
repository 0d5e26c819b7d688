"""Loading, replayed through the allocator, against what a GPU reported."""

from __future__ import annotations

import json

import pytest

from qtool.architecture import build_architecture
from qtool.formats.precisions import QuantFormat
from qtool.planner.loading import load_with_transformers

MIB = 1 << 20
FOLDERS = {"llama-3.2-3b": "mlc--llama3_2_3b", "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B"}


@pytest.mark.parametrize("quant", ["bf16", "int8", "nf4", "nf4-dq"])
def test_loading_takes_what_was_measured(test_data, quant):
    """Handed out at the end and at the peak: to a thousandth (peak with double quantization 2)."""
    lines = (test_data / "measured" / "h200_transformers_bitsandbytes.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    rows = [row for row in rows if row["kind"] == "load" and row["quant"] == quant]
    assert len(rows) == 2
    for row in rows:
        path = test_data / "configs" / FOLDERS[row["model"]] / "config.json"
        architecture = build_architecture(json.loads(path.read_text()))
        fmt = None if quant == "bf16" else QuantFormat(quant)
        packed = architecture.quantizable() if fmt else ()
        found = load_with_transformers(architecture, packed, fmt, element_bytes=2)
        assert found.allocated_bytes / MIB == pytest.approx(row["alloc"], rel=1e-3), row
        assert found.peak_bytes / MIB == pytest.approx(row["peak"], rel=2e-3), row
