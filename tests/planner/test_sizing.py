"""The guide, tables of GPUs, and the ceiling of decoding speed."""

from __future__ import annotations

import json

import pytest

from qtool.errors import QtoolError
from qtool.planner.gpus import find_gpu, read_catalogue
from qtool.planner.records import Workload
from qtool.planner.reference_models import reference_models
from qtool.planner.sizing import GUIDE_QUANTS, VRAM_CLASSES_GIB, SizingRequest, size_models
from tests.tiny_models import llama_config, write_llama


@pytest.fixture(scope="module")
def guide():
    return size_models(SizingRequest())


def test_guide_crosses_memory_sizes_with_reference_models_at_4_and_8_bit(guide):
    keys = [(row.vram_gib, row.model, row.quant) for row in guide.rows]
    sizes = [model.size for model in reference_models()]
    assert len(keys) == len(set(keys)) == len(VRAM_CLASSES_GIB) * len(sizes) * len(GUIDE_QUANTS)
    assert {row.vram_gib for row in guide.rows} == {8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192}
    assert list(guide.reference_models) == sizes
    assert all(row.decode_tok_s_ceiling is None for row in guide.rows)
    assert guide.warnings == ()


def test_guide_answers_what_is_known(guide):
    found = {(row.vram_gib, row.model, row.quant): row.verdict for row in guide.rows}
    assert found[8, "8B", "nf4-dq"] == "yes" and found[8, "8B", "int8"] == "no"
    assert found[24, "32B", "nf4-dq"] == "yes" and found[24, "24B", "int8"] == "no"
    assert found[48, "70B", "nf4-dq"] == "yes" and found[32, "70B", "nf4-dq"] == "no"
    assert found[80, "70B", "int8"] == "yes" and found[48, "70B", "int8"] == "no"


def test_more_memory_fits_as_much_and_larger_models_fit_less(guide):
    order = ["no", "tight", "yes"]
    rows = {(row.vram_gib, row.model, row.quant): row for row in guide.rows}
    sizes = list(guide.reference_models)
    for quant in GUIDE_QUANTS:
        for model in sizes:
            contexts = [rows[gib, model, quant].max_context for gib in VRAM_CLASSES_GIB]
            assert contexts == sorted(contexts)
        for gib in VRAM_CLASSES_GIB:
            verdicts = [order.index(rows[gib, model, quant].verdict) for model in sizes]
            assert verdicts == sorted(verdicts, reverse=True)


def test_a_named_model_is_sized_on_common_gpus(tmp_path):
    write_llama(tmp_path / "model")
    found = size_models(SizingRequest(models=(str(tmp_path / "model"),)))
    common = {gpu.name for gpu in read_catalogue() if gpu.common}
    assert len(common) >= 15 and {row.gpu.name for row in found.rows} == common
    assert {row.quant for row in found.rows} == {"bf16", "int8", "nf4-dq"}
    assert {row.vram_gib for row in found.rows} == {None}
    usable = [row.usable_bytes for row in found.rows if row.quant == "bf16"]
    assert usable == sorted(usable)


def test_gpus_and_memory_sizes_may_be_mixed():
    found = size_models(SizingRequest(gpus=("4090", "T4"), vram_gib=(11,), quants=("nf4",)))
    devices = list(dict.fromkeys((row.gpu.short_name, row.vram_gib) for row in found.rows))
    assert devices == [("11 GiB", 11), ("T4", None), ("RTX 4090", None)]


def test_ceiling_is_bandwidth_over_weights_and_cache_that_a_token_reads(tmp_path):
    config = write_llama(tmp_path, hidden=256, mlp=512)
    request = SizingRequest((str(tmp_path),), ("bf16",), context=100, gpus=("4090",))
    (row,) = size_models(request).rows
    num_weights = sum(
        tensor.num_elements for name, tensor in _layouts(tmp_path).items() if "embed" not in name
    )
    kv_elements = 2 * config["hidden_size"] // 2 * config["num_hidden_layers"] * 100
    expected = find_gpu("4090").bandwidth_gb_s * 1e9 / (2 * num_weights + 2 * kv_elements)
    assert row.decode_tok_s_ceiling == pytest.approx(expected)


def _layouts(folder):
    from qtool.planner.model import open_model

    return open_model(str(folder)).layouts


def test_ceiling_of_a_published_pair(test_data):
    """Llama 3.1 8B in bf16 on an H100 SXM: 3,350 GB/s over 15.0 GB of weights."""
    config = test_data / "configs" / "meta-llama--Meta-Llama-3.1-8B" / "config.json"
    request = SizingRequest((str(config),), ("bf16",), context=1, gpus=("h100",))
    (row,) = size_models(request).rows
    assert row.decode_tok_s_ceiling == pytest.approx(3350 / 15.01, rel=1e-3)


def test_sequences_share_the_weights_but_not_the_cache(tmp_path):
    write_llama(tmp_path)
    one, many = (
        size_models(
            SizingRequest(
                (str(tmp_path),), ("bf16",), context=1, workload=Workload(1, batch), gpus=("t4",)
            )
        ).rows[0]
        for batch in (1, 64)
    )
    assert one.decode_tok_s_ceiling < many.decode_tok_s_ceiling < 64 * one.decode_tok_s_ceiling


def test_warnings_name_their_model(tmp_path):
    config = {**llama_config(), "dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = size_models(SizingRequest((str(tmp_path),), gpus=("4090",)))
    assert found.warnings and all(str(tmp_path) in warning for warning in found.warnings)


def test_an_impossible_precision_is_an_error(tmp_path):
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = {**llama_config(), "quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="quantized already"):
        size_models(SizingRequest((str(tmp_path),), quants=("nf4",)))
    assert {row.quant for row in size_models(SizingRequest((str(tmp_path),))).rows} == {"int8"}
