"""Whatever a folder holds, verify answers with problems, never with an exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.formats.precisions import QuantFormat
from qtool.inspection import verify_folder
from tests.cli.running import run
from tests.inspection.folders import INDEX, MANIFEST, quantized_llama

Q = "model.layers.0.self_attn.q_proj.weight"
NF4_DQ = QuantFormat("nf4-dq", 32)

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def verify(parts, change=lambda path: None):
    with tempfile.TemporaryDirectory() as folder:
        path = parts.write(Path(folder) / "out")
        change(path)
        return verify_folder(path)


def entries(*keys):
    """Objects that have some of the keys, with values of any type."""
    return st.dictionaries(st.sampled_from(keys), json_values, min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    entries(
        "quant_method",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage",
        "bnb_4bit_compute_dtype",
        "llm_int8_skip_modules",
        "llm_int8_has_fp16_weight",
    )
)
def test_any_quantization_config(values):
    parts, _ = quantized_llama(NF4_DQ)
    parts.quantization.update(values)
    verify(parts)


@settings(max_examples=60, deadline=None)
@given(
    entries(
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    )
)
def test_any_quant_state(values):
    parts, _ = quantized_llama(NF4_DQ)
    parts.change_quant_state(Q, **values)
    verify(parts)


@settings(max_examples=60, deadline=None)
@given(json_values | entries("metadata", "weight_map"))
def test_any_index(value):
    parts, _ = quantized_llama(NF4_DQ)
    verify(parts, lambda path: (path / INDEX).write_text(json.dumps(value)))


@settings(max_examples=60, deadline=None)
@given(
    json_values | entries("schema", "files") | st.builds(lambda v: {"files": {"a": v}}, json_values)
)
def test_any_manifest(value):
    parts, _ = quantized_llama(NF4_DQ)
    verify(parts, lambda path: (path / MANIFEST).write_text(json.dumps(value)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["model-00001-of-00002.safetensors", "config.json"]))
def test_any_flipped_bytes(seed, name):
    """Most flips hit the header, where they do most."""

    def flip(path):
        rng = np.random.default_rng(seed)
        data = bytearray((path / name).read_bytes())
        for position in rng.integers(0, min(len(data), 4096), 4):
            data[position] = rng.integers(256)
        (path / name).write_bytes(data)

    parts, _ = quantized_llama(NF4_DQ)
    verify(parts, flip)


def test_a_giant_quant_state_is_refused_unread(tmp_path):
    parts, _ = quantized_llama(NF4_DQ)
    state = f"{Q}.quant_state.bitsandbytes__nf4"
    parts[state] = ("U8", np.full(1 << 20, ord(" "), np.uint8))
    (problem,) = verify_folder(parts.write(tmp_path / "out")).problems
    assert problem.rule == "quant-state" and "65537" in problem.found


@pytest.mark.parametrize("color", ["always", "never"])
def test_names_in_files_cannot_steer_the_terminal(color, tmp_path):
    parts, _ = quantized_llama(NF4_DQ)
    parts.quantization["bnb_4bit_compute_dtype"] = "[red]x[/red]\x1b[31mgone\x07"
    parts.shards["model-00001-of-00002.safetensors"]["a[bold]b.weight"] = (
        "F32", np.zeros((2, 2), np.float32),
    )  # fmt: skip
    path = parts.write(tmp_path / "out")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["\x1b]0;title\x07"] = "model-00001-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    ran = run("inspect", path, "--verify", "--tensors", "--color", color)
    assert ran.exit_code == 3
    assert "\x1b]0" not in ran.stdout and "\x1b[31mgone" not in ran.stdout
    assert "\x07" not in ran.stdout

    del index["weight_map"]["\x1b]0;title\x07"]
    (path / INDEX).write_text(json.dumps(index))
    ran = run("inspect", path, "--tensors", "--color", color)
    assert "a[bold]b.weight" in ran.stdout and "[red]x" in ran.stdout
