"""What `estimate` answers for models of every kind, and what it warns of."""

from __future__ import annotations

import json

import pytest

from qtool.errors import QtoolError
from qtool.planner.estimate import EstimateRequest, estimate_model
from tests.tiny_models import llama_config, write_llama


def estimate(model, **options):
    return estimate_model(EstimateRequest(str(model), **options))


def write_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    config = {**llama_config(), "dtype": "bfloat16", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_defaults_are_four_precisions_and_4096_tokens(tmp_path):
    found = estimate(write_config(tmp_path, max_position_embeddings=100_000))
    assert [plan.quant for plan in found.plans] == ["bf16", "int8", "nf4", "nf4-dq"]
    assert {(plan.workload.context, plan.workload.batch) for plan in found.plans} == {(4096, 1)}
    assert {(plan.workload.mode, plan.workload.runtime) for plan in found.plans} == {
        ("generate", "qtool")
    }
    assert found.warnings == ()


def test_default_context_ends_at_what_the_model_was_made_for(tmp_path):
    found = estimate(write_config(tmp_path, max_position_embeddings=300))
    assert found.plans[0].workload.context == 300 and found.warnings == ()


def test_a_longer_context_than_the_model_s_is_planned_with_a_warning(tmp_path):
    found = estimate(write_config(tmp_path, max_position_embeddings=300), context=301)
    assert found.plans[0].workload.context == 301
    assert estimate(tmp_path, context=300).warnings == ()
    assert "301 is longer" in found.warnings[0] and "300" in found.warnings[0]


def test_precisions_asked_for_twice_are_planned_once(tmp_path):
    found = estimate(write_config(tmp_path), quants=("nf4", "fp32", "nf4"))
    assert [plan.quant for plan in found.plans] == ["nf4", "fp32"]


def test_headers_and_config_agree(tmp_path):
    write_llama(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_config(tmp_path / "bare", **config)
    stored, bare = estimate(tmp_path / "model"), estimate(tmp_path / "bare")
    assert (stored.model.source, bare.model.source) == ("headers", "config")
    assert stored.model.parameters == bare.model.parameters == stored.model.checkpoint_parameters
    assert bare.model.checkpoint_parameters is None
    for ours, theirs in zip(stored.plans, bare.plans, strict=True):
        assert ours.checkpoint_bytes == theirs.checkpoint_bytes
        assert ours.peak_bytes == theirs.peak_bytes


def test_a_config_without_a_dtype_is_taken_as_bf16_and_says_so(tmp_path):
    with_dtype = estimate(write_config(tmp_path / "with"))
    without = estimate(write_config(tmp_path / "without", dtype=None))
    assert "names no dtype" in without.warnings[0]
    assert [p.peak_bytes for p in without.plans] == [p.peak_bytes for p in with_dtype.plans]


def test_float32_activations_are_named_where_quantizing_keeps_them(tmp_path):
    wide = estimate(write_config(tmp_path / "wide", dtype="float32"))
    narrow = estimate(write_config(tmp_path / "narrow"))
    assert "float32" in wide.warnings[0] and "--compute-dtype bfloat16" in wide.warnings[0]
    cache = [plan.components["kv_cache"].bytes for plan in wide.plans]
    assert cache[1] == 2 * cache[0] == 2 * narrow.plans[1].components["kv_cache"].bytes


def test_an_unknown_type_with_weights_has_a_size_and_a_warning(tmp_path):
    write_llama(tmp_path)
    write_config(tmp_path, model_type="unheard_of")
    found = estimate(tmp_path, gpus=("4090",))
    assert [plan.quant for plan in found.plans] == ["bf16"]
    assert found.model.architecture is None and found.model.active_parameters is None
    assert found.model.parameters == found.model.checkpoint_parameters > 0
    assert "kv_cache" not in found.plans[0].components
    assert found.plans[0].fits[0].max_context is None
    warnings = " ".join(found.warnings)
    assert "unheard_of" in warnings and "not counted" in warnings
    assert "int8, nf4, nf4-dq left out" in warnings


def test_an_unknown_type_cannot_be_planned_in_4_bit(tmp_path):
    write_llama(tmp_path)
    write_config(tmp_path, model_type="unheard_of")
    with pytest.raises(QtoolError, match="which of its tensors are linear") as raised:
        estimate(tmp_path, quants=("nf4",))
    assert raised.value.kind == "unsupported"


def test_an_unknown_type_without_weights_is_an_error(tmp_path):
    with pytest.raises(QtoolError, match="unheard_of") as raised:
        estimate(write_config(tmp_path, model_type="unheard_of"))
    assert raised.value.kind == "unsupported"


def test_a_model_whose_layers_are_not_replaced_says_so(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "falcon", "dtype": "bfloat16", "num_hidden_layers": 1})
    )
    found = estimate(tmp_path)
    assert any("changes nothing" in warning for warning in found.warnings)
    assert len({plan.checkpoint_bytes for plan in found.plans}) == 1


def test_parts_that_are_not_modelled_are_named(test_data):
    found = estimate(test_data / "configs" / "Qwen--Qwen3-VL-8B-Instruct")
    assert any("not counted: vision tower activations" in warning for warning in found.warnings)


def test_int8_with_fp16_weights_is_planned_as_what_it_stores(tmp_path):
    write_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plain = estimate(tmp_path).plans
    entry = {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    found = estimate(tmp_path)
    assert found.plans == plain
    assert any("llm_int8_has_fp16_weight" in warning for warning in found.warnings)


def test_a_plan_that_fits_nowhere_is_helped_by_precisions_not_asked_for(test_data):
    config = test_data / "configs" / "meta-llama--Meta-Llama-3.1-8B" / "config.json"
    found = estimate(config, quants=("bf16",), gpus=("RTX 3060", "RTX 4060"))
    assert not found.fits_somewhere
    (plan,) = found.plans
    assert [s.change for s in plan.suggestions][:2] == ["int8", "nf4"]
    assert estimate(config, quants=("bf16",), gpus=("4060", "4090")).fits_somewhere


def test_headroom_lowers_what_is_usable(tmp_path):
    write_config(tmp_path)
    whole, less = (
        estimate(tmp_path, gpus=("4090",), headroom_percent=percent).plans[0].fits[0]
        for percent in (0, 10)
    )
    assert less.usable_bytes == int(whole.usable_bytes * 0.9)


def test_an_unknown_gpu_is_told_before_the_model_is_looked_at(tmp_path):
    with pytest.raises(QtoolError, match="RTX 9999"):
        estimate(tmp_path / "nowhere", gpus=("RTX 9999",))


CONFIG_FOLDERS_THAT_ANSWER = 25


def test_every_published_config_is_answered_or_refused_with_a_reason(test_data):
    answered = 0
    counts = json.loads((test_data / "configs" / "COUNTS.json").read_text())
    for name, entry in counts.items():
        try:
            found = estimate(test_data / "configs" / name / "config.json")
        except QtoolError as error:
            assert error.kind == "unsupported" and error.hint, name
            continue
        assert found.model.parameters == entry["counts"]["params"], name
        assert all(0 < plan.peak_low_bytes < plan.peak_high_bytes for plan in found.plans)
        answered += 1
    assert answered >= CONFIG_FOLDERS_THAT_ANSWER
