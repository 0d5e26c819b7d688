"""Errors against float64, tile by tile; copied tensors byte for byte."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.backends import choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.formats import double_quant, floats, four_bit, int8
from qtool.formats.precisions import QuantFormat
from qtool.inspection import compare, compare_checkpoints, weights
from qtool.inspection.compare import ErrorSums, layer_kind
from tests.inspection.folders import FolderParts, pack, quantized_llama

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
FORMATS = [
    QuantFormat("nf4", 32),
    QuantFormat("nf4-dq", 32),
    QuantFormat("fp4-dq", 64),
    QuantFormat("int8"),
]


def compare_folders(quantized, original):
    return compare_checkpoints(
        open_checkpoint(str(quantized), need="files", need_config=False),
        open_checkpoint(str(original), need="files", need_config=False),
        choose_backend("cpu").backend,
    )


def dequantized(values, dtype, fmt):
    """float32, by the reference rules, whole."""
    if fmt.is_int8:
        return int8.dequantize_int8(*int8.quantize_int8(values, dtype))
    flat = floats.widen(values, dtype).reshape(-1)
    codes, absmax = four_bit.quantize_4bit(flat, fmt.quant_type, fmt.blocksize)
    if fmt.double_quant:
        absmax = double_quant.dequantize_absmax(*double_quant.quantize_absmax(absmax))
    read_back = four_bit.dequantize_4bit(codes, absmax, fmt.quant_type, fmt.blocksize, flat.size)
    return floats.widen(floats.narrow(read_back, dtype), dtype).reshape(values.shape)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 blocks of 64, so that small matrices have several."""
    monkeypatch.setattr(weights, "TILE_ELEMENTS", 256 * 64)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.precision)
def test_errors_are_those_of_whole_matrices_in_float64(fmt, dtype, small_tiles, tmp_path):
    parts, original = quantized_llama(fmt, dtype=dtype, hidden=132, mlp=255, heads=2, vocab=8)
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    assert len(found.errors) == 14
    for error in found.errors:
        truth = floats.widen(original[error.name], dtype).astype(np.float64)
        difference = dequantized(original[error.name], dtype, fmt) - truth
        relative = np.linalg.norm(difference) / np.linalg.norm(truth)
        assert error.num_parameters == truth.size
        assert error.mse == pytest.approx((difference**2).mean(), rel=1e-12)
        assert error.relative_error == pytest.approx(relative, rel=1e-12)
        assert error.max_abs_error == np.abs(difference).max()
        assert error.sqnr_db == pytest.approx(-20 * np.log10(relative), rel=1e-12)
    assert found.differences == () and found.num_equal == 7


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.precision)
@pytest.mark.parametrize("shape", [(200, 300), (180, 180)], ids=["wide", "square"])
def test_conv1d_originals_are_read_transposed(fmt, shape, small_tiles, tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": shape[0],
        "n_inner": shape[1], "n_layer": 1, "n_head": 2, "vocab_size": 8, "n_positions": 8,
    }  # fmt: skip
    stored = np.random.default_rng(0).normal(size=shape).astype(np.float32)  # [in, out]
    packed = pack(name, np.ascontiguousarray(stored.T), "F32", fmt)
    quantized = FolderParts(config, {"model.safetensors": packed}, has_index=False)
    original = FolderParts(config, {"model.safetensors": {name: ("F32", stored)}}, has_index=False)
    found = compare_folders(quantized.write(tmp_path / "q"), original.write(tmp_path / "o"))
    difference = dequantized(stored.T, "F32", fmt) - stored.T.astype(np.float64)
    assert found.errors[0].mse == pytest.approx((difference**2).mean(), rel=1e-12)


def test_a_changed_copy_is_named_with_what_changed(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    parts[NORM] = ("BF16", parts[NORM] ^ np.uint16(1 << 8))
    parts["lm_head.weight"] = ("F32", floats.widen(parts["lm_head.weight"], "BF16"))
    del parts["model.layers.0.input_layernorm.weight"]
    parts.shards["model-00001-of-00002.safetensors"]["model.extra"] = (
        "F32",
        np.ones(2, np.float32),
    )
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    assert {difference.name: difference.reason for difference in found.differences} == {
        NORM: "21 of 42 bytes differ",
        "lm_head.weight": "dtype F32, in the original BF16",
        "model.layers.0.input_layernorm.weight": "in the original only",
        "model.extra": "not in the original",
    }
    assert found.num_equal == 4


def test_a_long_copy_is_compared_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK_BYTES", 64)
    parts, original = quantized_llama(QuantFormat("nf4"))
    parts["lm_head.weight"] = ("BF16", parts["lm_head.weight"].copy())
    parts["lm_head.weight"][-1, -1] ^= 1
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    assert [d.reason for d in found.differences] == ["1 of 1,680 bytes differ"]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_changed_copy_has_the_error_of_its_values(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(compare, "TILE_ELEMENTS", 100)
    _, original = quantized_llama(QuantFormat("nf4"), dtype=dtype)
    folder = original.write(tmp_path / "original")
    before = floats.widen(original[Q], dtype).astype(np.float64)
    changed = floats.narrow((before * 1.125).astype(np.float32), dtype)
    original[Q] = (dtype, changed)
    found = compare_folders(original.write(tmp_path / "changed"), folder)
    (difference,) = found.differences
    after = floats.widen(changed, dtype).astype(np.float64)
    relative = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert difference.name == Q and "bytes differ" in difference.reason
    assert difference.error.relative_error == pytest.approx(relative, rel=1e-12)
    assert difference.error.max_abs_error == np.abs(after - before).max()
    assert difference.error.kind == "self_attn.q_proj"


def test_names_without_the_base_model_s_prefix_are_matched(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    original.shards = {
        shard: {name.removeprefix("model."): tensor for name, tensor in part.items()}
        for shard, part in original.shards.items()
    }
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    assert len(found.errors) == 14 and found.differences == ()


def test_either_of_two_tied_weights_may_be_the_stored_one(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"), tied=True)
    parts.shard_of(NORM)["lm_head.weight"] = ("BF16", parts["model.embed_tokens.weight"])
    del parts["model.embed_tokens.weight"]
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    assert found.differences == () and found.num_equal == 6


def test_another_shape_is_a_difference(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    original[Q] = ("BF16", np.zeros((24, 21), np.uint16))
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    reasons = {difference.name: difference.reason for difference in found.differences}
    assert reasons == {Q: "shape [21, 21], in the original [24, 21]"}
    assert len(found.errors) == 13


@pytest.mark.parametrize("norms", [24, 21], ids=["nothing alike", "norms alike"])
def test_layers_that_all_have_other_shapes_are_no_comparison(norms, tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    _, wider = quantized_llama(QuantFormat("nf4"), hidden=24, heads=3, mlp=33, vocab=40)
    for shard in wider.shards.values():
        for name, (dtype, values) in shard.items():
            if "norm" in name:
                shard[name] = (dtype, values[:norms])
    with pytest.raises(QtoolError, match=r"nothing in .*proj.weight: shape \[21, ") as caught:
        compare_folders(parts.write(tmp_path / "q"), wider.write(tmp_path / "o"))
    assert caught.value.kind == "usage" and "made from" in caught.value.hint


def test_folders_without_packed_layers_have_to_share_one_shape(tmp_path):
    _, ours = quantized_llama(QuantFormat("nf4"))
    _, wider = quantized_llama(QuantFormat("nf4"), hidden=24, heads=3, mlp=35, vocab=41)
    with pytest.raises(QtoolError, match=r"nothing in .* can be compared with"):
        compare_folders(ours.write(tmp_path / "q"), wider.write(tmp_path / "o"))
    wider[NORM] = ("BF16", np.zeros(21, np.uint16))
    found = compare_folders(ours.write(tmp_path / "q2"), wider.write(tmp_path / "o2"))
    assert {d.name for d in found.differences if "bytes differ" in d.reason} == {NORM}


def test_a_quantized_original_is_refused(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    path = parts.write(tmp_path / "q")
    with pytest.raises(QtoolError, match="is quantized itself") as caught:
        compare_folders(path, path)
    assert caught.value.kind == "usage" and "--against" in caught.value.hint


def test_a_model_with_other_names_is_refused(tmp_path):
    parts, _ = quantized_llama(QuantFormat("nf4"))
    tensors = {"encoder.weight": ("F32", np.ones((2, 2), np.float32))}
    stranger = FolderParts({}, {"model.safetensors": tensors}, has_index=False)
    with pytest.raises(QtoolError, match="no tensor in common"):
        compare_folders(parts.write(tmp_path / "q"), stranger.write(tmp_path / "o"))


def test_statistics_that_do_not_fit_are_named(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    parts[f"{Q}.absmax"] = ("F32", parts[f"{Q}.absmax"][:-1])
    with pytest.raises(QtoolError, match=r"q_proj.weight.absmax: expected 7 elements, found 6"):
        compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))


def test_nan_shows_in_every_measure(tmp_path):
    parts, original = quantized_llama(QuantFormat("nf4"))
    parts[f"{Q}.absmax"][0] = np.nan
    found = compare_folders(parts.write(tmp_path / "q"), original.write(tmp_path / "o"))
    error = next(error for error in found.errors if error.name == Q)
    measures = (error.mse, error.relative_error, error.max_abs_error, error.sqnr_db)
    assert all(math.isnan(measure) for measure in measures)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_not_lost_in_whichever_part_it_comes(place):
    sums = ErrorSums()
    for part in range(3):
        sums.add(np.full(4, np.nan if part == place else 2, np.float32), np.ones(4, np.float32))
    error = sums.as_layer_error("x.weight", "nf4")
    assert math.isnan(error.mse) and math.isnan(error.max_abs_error)


floats32 = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(floats32, floats32), min_size=1, max_size=40), st.integers(1, 7))
def test_sums_do_not_depend_on_how_values_are_cut(pairs, step):
    found, exact = (np.array(side, np.float32) for side in zip(*pairs, strict=True))
    sums = ErrorSums()
    for start in range(0, found.size, step):
        sums.add(found[start : start + step], exact[start : start + step])
    error = sums.as_layer_error("x.weight", "nf4")
    difference = found.astype(np.float64) - exact
    assert error.mse == pytest.approx((difference**2).mean(), rel=1e-12, abs=1e-300)
    assert error.max_abs_error == np.abs(difference).max()
    if np.any(exact):
        relative = np.linalg.norm(difference) / np.linalg.norm(exact.astype(np.float64))
        assert error.relative_error == pytest.approx(relative, rel=1e-9, abs=1e-300)


def test_no_error_at_all_is_zero_and_infinitely_many_decibels():
    sums = ErrorSums()
    sums.add(np.ones(3, np.float32), np.ones(3, np.float32))
    error = sums.as_layer_error("x.weight", "nf4")
    assert (error.mse, error.relative_error, error.sqnr_db) == (0, 0, math.inf)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (Q, "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc.weight", "mlp.c_fc"),
        ("model.layers.0.mlp.experts.7.w1.weight", "experts.w1"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_kind_of_a_layer_leaves_its_number_out(name, kind):
    assert layer_kind(name) == kind
