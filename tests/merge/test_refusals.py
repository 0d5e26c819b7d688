"""What cannot be merged is refused before a byte is written, with the reason and the next step."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qtool.errors import QtoolError
from qtool.formats.precisions import QuantFormat
from qtool.merge.command import MergeRequest, plan_merge, run_merge
from qtool.quantize.command import QuantizeRequest, plan_request, run_request
from qtool.quantize.plan import Recipe
from tests.merge.adapters import PREFIX, linear_layers, lora_tensors, write_adapter
from tests.tiny_models import write_llama

Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path):
    config = write_llama(tmp_path / "model")
    return tmp_path / "model", config


@pytest.fixture
def tensors(model):
    return lora_tensors(linear_layers(model[1]))


def refusal(adapter, **request):
    output = adapter.parent / "out"
    with pytest.raises(QtoolError) as caught:
        run_merge(plan_merge(MergeRequest(adapter, output, **request)))
    assert not output.exists()
    assert caught.value.hint
    return caught.value


# ---- The adapter ------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path):
    error = refusal(tmp_path / "nowhere")
    assert error.kind == "not_found" and "no such folder" in error.message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_its_files(tmp_path, model, tensors, name):
    adapter = write_adapter(tmp_path / "a", tensors, model[0])
    (adapter / name).unlink()
    error = refusal(adapter)
    assert error.kind == "not_found" and f"holds no {name}" in error.message


def test_a_pickle_is_named_as_one(tmp_path, model, tensors):
    adapter = write_adapter(tmp_path / "a", tensors, model[0])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickle" in refusal(adapter).message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "single rows"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [7]}, "some tokens only"),
        ({"use_qalora": True}, "pools"),
        ({"kasa_config": {"beta": 1}}, "singular values"),
        ({"use_something_new": True}, "does not know"),
        ({"init_lora_weights": "pissa"}, "changed the base's weights"),
        ({"init_lora_weights": "loftq"}, "changed the base's weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_more_than_a_low_rank_update(tmp_path, model, tensors, config, words):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], **config))
    assert error.kind == "unsupported" and words in error.message


def test_keys_that_say_nothing_are_no_reason_to_refuse(tmp_path, model, tensors):
    adapter = write_adapter(
        tmp_path / "a",
        tensors,
        model[0],
        use_something_new=False,
        other=None,
        more=[],
        eva_config={},
    )
    run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out")))


@pytest.mark.parametrize("value", ["8", 0, True, None])
def test_a_rank_that_is_none(tmp_path, model, tensors, value):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], r=value))
    assert error.kind == "bad_file" and "r is" in error.message


def test_a_rank_that_the_tensors_do_not_have(tmp_path, model, tensors):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], r=8))
    assert "implies rank 8, found lora_A [4, 64]" in error.message


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_of_an_update(tmp_path, model, tensors, part):
    del tensors[f"{Q_PROJ}.{part}.weight"]
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert f"q_proj has no {part}" in error.message


def test_dora_without_its_magnitudes_and_magnitudes_without_dora(tmp_path, model, tensors):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], use_dora=True))
    assert "no lora_magnitude_vector" in error.message
    tensors[f"{Q_PROJ}.lora_magnitude_vector"] = ("F32", np.ones(64, np.float32))
    error = refusal(write_adapter(tmp_path / "b", tensors, model[0]))
    assert "has a lora_magnitude_vector, but use_dora is False" in error.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_values_that_are_not_finite(tmp_path, model, dtype, value):
    tensors = lora_tensors(linear_layers(model[1]), dtype=dtype)
    name = f"{Q_PROJ}.lora_B.weight"
    values = tensors[name][1].copy()
    bits = np.float32(value).view(np.uint32) >> 16
    values[5, 2] = bits if dtype == "BF16" else value
    tensors[name] = (dtype, values)
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert error.kind == "bad_file"
    assert f"{name}: expected finite values, found 1 that are not" in error.message
    assert "the first at element 22" in error.message


def test_a_dtype_that_is_no_float(tmp_path, model, tensors):
    tensors[f"{Q_PROJ}.lora_A.weight"] = ("I8", np.zeros((4, 64), np.int8))
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert error.kind == "unsupported" and "is I8" in error.message


def test_tensors_that_belong_to_a_variant(tmp_path, model, tensors):
    tensors[f"{Q_PROJ}.lora_diag"] = ("F32", np.ones(4, np.float32))
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert "lora_diag, which is no plain LoRA" in error.message


def test_dora_of_an_embedding(tmp_path, model):
    name = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": ("F32", np.ones((4, 96), np.float32)),
        f"{name}.lora_embedding_B": ("F32", np.ones((64, 4), np.float32)),
        f"{name}.lora_magnitude_vector": ("F32", np.ones(64, np.float32)),
    }
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], use_dora=True))
    assert error.kind == "unsupported" and "DoRA of an embedding" in error.message


# ---- Adapter and base -------------------------------------------------------------------------


def test_a_module_that_the_base_lacks_and_the_nearest_names(tmp_path, model, tensors):
    for part in "AB":
        name = f"{Q_PROJ}.lora_{part}.weight"
        tensors[name.replace("q_proj", "qq_proj")] = tensors.pop(name)
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert error.kind == "bad_file"
    assert "expected model.layers.0.self_attn.qq_proj.weight" in error.message
    assert "the nearest are model.layers.0.self_attn.q_proj.weight" in error.message


def test_a_layer_too_many(tmp_path, tensors):
    write_llama(tmp_path / "small", layers=1)
    error = refusal(write_adapter(tmp_path / "a", tensors, tmp_path / "small"))
    assert "model.layers.1" in error.message


def test_an_adapter_of_a_model_of_another_size(tmp_path, tensors):
    write_llama(tmp_path / "wide", hidden=128)
    error = refusal(write_adapter(tmp_path / "a", tensors, tmp_path / "wide"))
    assert error.kind == "bad_file"
    assert "implies a weight [64, 64], but model.layers.0.self_attn.q_proj.weight" in error.message
    assert "[128, 128]" in error.message


def test_a_vocabulary_that_was_resized(tmp_path, model):
    tensors = {f"{PREFIX}model.embed_tokens.weight": ("F32", np.ones((98, 64), np.float32))}
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert error.kind == "unsupported" and "98 rows" in error.message


def test_a_bias_that_the_base_lacks(tmp_path, model, tensors):
    tensors[f"{Q_PROJ}.lora_B.bias"] = ("F32", np.ones(64, np.float32))
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], lora_bias=True))
    assert "expected model.layers.0.self_attn.q_proj.bias" in error.message


def test_a_base_that_is_not_here(tmp_path, tensors):
    error = refusal(write_adapter(tmp_path / "a", tensors, tmp_path / "gone"))
    assert error.kind == "not_found" and "names is not here" in error.message
    assert "base='MODEL'" in error.hint
    error = refusal(write_adapter(tmp_path / "b", tensors, None))
    assert error.kind == "usage" and "names no base model" in error.message


def test_base_overrides_what_the_config_names(tmp_path, model, tensors):
    adapter = write_adapter(tmp_path / "a", tensors, tmp_path / "gone")
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out", base=str(model[0])))
    assert planned.base.onto == "original" and planned.base.trained_on == str(model[0])


def test_a_base_quantized_by_another_method(tmp_path, model, tensors):
    folder, config = model
    entry = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    error = refusal(write_adapter(tmp_path / "a", tensors, folder))
    assert error.kind == "unsupported" and "'gptq'" in error.message


def test_dequantized_of_what_is_not_packed(tmp_path, model, tensors):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]), onto="dequantized")
    assert error.kind == "usage" and "is not packed" in error.message
    assert "qtool quantize" in error.hint


def packed_of(folder, output):
    request = QuantizeRequest(str(folder), output, Recipe(QuantFormat("nf4")), "cpu")
    run_request(plan_request(request))
    return output


def test_original_of_a_packed_base_that_does_not_name_it(tmp_path, model, tensors):
    packed = packed_of(model[0], tmp_path / "packed")
    (packed / "qtool_manifest.json").unlink()
    error = refusal(write_adapter(tmp_path / "a", tensors, packed), onto="original")
    assert error.kind == "usage" and "names its original" in error.message


def test_original_that_moved_or_changed(tmp_path, model, tensors):
    packed = packed_of(model[0], tmp_path / "packed")
    adapter = write_adapter(tmp_path / "a", tensors, packed)
    shutil.rmtree(model[0])
    assert "neither beside it nor here" in refusal(adapter, onto="original").message
    write_llama(model[0], layers=3)
    assert "has other files now" in refusal(adapter, onto="original").message
    elsewhere = tmp_path / "elsewhere"
    write_llama(elsewhere)
    planned = plan_merge(
        MergeRequest(adapter, tmp_path / "out", base=str(elsewhere), onto="original")
    )
    assert planned.base.onto == "original"
    assert planned.base.trained_on == str(packed)  # what the logits are compared with


def test_a_damaged_quant_state(tmp_path, model, tensors):
    packed = packed_of(model[0], tmp_path / "packed")
    path = packed / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"blocksize": 64', b'"blocksize": 65', 1))
    error = refusal(write_adapter(tmp_path / "a", tensors, packed))
    assert error.kind == "bad_file" and "blocksize is 65" in error.message


def test_quantizing_a_model_that_is_not_known(tmp_path, model, tensors):
    folder, config = model
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    adapter = write_adapter(tmp_path / "a", tensors, folder)
    error = refusal(adapter, recipe=Recipe(QuantFormat("nf4")))
    assert error.kind == "unsupported" and "unheard_of" in error.message


# ---- The output -------------------------------------------------------------------------------


def test_no_output_in_the_folders_that_are_read(tmp_path, model, tensors):
    adapter = write_adapter(tmp_path / "a", tensors, model[0])
    for output in (model[0], adapter, adapter / "merged"):
        before = sorted(output.parent.rglob("*"))
        with pytest.raises(QtoolError, match="lies in the source folder"):
            run_merge(plan_merge(MergeRequest(adapter, output)))
        assert sorted(output.parent.rglob("*")) == before


def test_no_output_over_foreign_files(tmp_path, model, tensors):
    adapter = write_adapter(tmp_path / "a", tensors, model[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(QtoolError, match=r"not written by qtool \(found mine.txt\)"):
        run_merge(plan_merge(MergeRequest(adapter, tmp_path / "out")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
