"""What cannot be merged is refused before a byte is written, with the reason and the next step."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qtool.architecture import build_architecture
from qtool.errors import QtoolError
from qtool.formats.precisions import QuantFormat
from qtool.merge.command import MergeRequest, plan_merge, run_merge
from qtool.merge.targets import is_target, stack_of
from qtool.quantize.command import QuantizeRequest, plan_request, run_request
from qtool.quantize.plan import Recipe
from tests.merge.adapters import (
    LINEAR,
    PREFIX,
    linear_layers,
    lora_tensors,
    read_folder,
    write_adapter,
)
from tests.tiny_models import llama_config, llama_shapes, save_tensors, write_llama

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


def test_another_model_is_told_from_an_adapter_that_is_incomplete(tmp_path, tensors):
    write_llama(tmp_path / "large", hidden=128, layers=3)  # it lacks the third layer, too
    trained = {"target_modules": list(LINEAR)}
    error = refusal(write_adapter(tmp_path / "a", tensors, tmp_path / "large", **trained))
    assert "implies a weight [64, 64]" in error.message and "another model" in error.hint
    write_llama(tmp_path / "deep", layers=3)
    error = refusal(write_adapter(tmp_path / "b", tensors, tmp_path / "deep", **trained))
    assert "model.layers.2" in error.message
    assert "is incomplete" in error.hint and "another model: name its own with base" in error.hint


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
    was = f"{packed} was quantized from model, "
    error = refusal(adapter, onto="original")
    assert error.message == was + "which is neither beside it nor here"
    write_llama(model[0], layers=3)
    error = refusal(adapter, onto="original")
    assert error.message == was + f"but {model[0].resolve()} has other files now"
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


# ---- What its config says was trained ---------------------------------------------------------


def without_module(tensors, module):
    return {name: entry for name, entry in tensors.items() if f".{module}." not in name}


@pytest.mark.parametrize(
    "targets",
    [list(LINEAR), "all-linear", r".*\.(q|v)_proj", ["model.layers.1.self_attn.v_proj"]],
    ids=["ends", "all linear", "pattern", "names"],
)
def test_a_module_that_was_trained_and_of_which_nothing_came(tmp_path, model, tensors, targets):
    fewer = without_module(tensors, "layers.1.self_attn.v_proj")
    error = refusal(write_adapter(tmp_path / "a", fewer, model[0], target_modules=targets))
    assert error.kind == "bad_file"
    lost = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"
    assert f"adapter_model.safetensors: expected {lost}" in error.message
    assert "target_modules" in error.message and "target_modules" in error.hint
    error = refusal(
        write_adapter(tmp_path / "b", {}, model[0], target_modules=targets, modules_to_save=[])
    )
    assert "holds no tensors" in error.message


def test_how_many_modules_were_lost(tmp_path, model, tensors):
    fewer = without_module(tensors, "layers.1.mlp.up_proj")
    fewer = without_module(fewer, "layers.0.mlp.up_proj")
    error = refusal(write_adapter(tmp_path / "a", fewer, model[0], target_modules=["up_proj"]))
    assert "model.layers.0.mlp.up_proj.lora_A.weight and 1 more" in error.message


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": r".*\.layers\.1\..*"},
        {"target_modules": [*LINEAR, "qkv_proj", "lm_haed"], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_modules_that_were_left_out_are_not_missed(tmp_path, model, tensors, config):
    fewer = {name: entry for name, entry in tensors.items() if ".layers.1." not in name}
    fields = {"target_modules": list(LINEAR), **config}
    adapter = write_adapter(tmp_path / "a", fewer, model[0], **fields)
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out"))
    assert planned.sources.count()["merged"] == 7
    error = refusal(write_adapter(tmp_path / "b", fewer, model[0], target_modules=list(LINEAR)))
    assert "model.layers.1" in error.message


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "model.layers"),
        ("model.layers.1.mlp.experts.7.up_proj", "model.layers"),
        ("model.vision_tower.encoder.layers.0.fc1.weight", "model.vision_tower.encoder.layers"),
        ("model.norm.weight", None),
    ],
)
def test_modules_are_told_apart_by_their_stacks(name, stack):
    assert stack_of(name) == stack


def test_a_tower_that_the_adapter_leaves_alone_is_not_missed(tmp_path, test_data):
    """Trained on the text alone, whose layers have the names of the tower's."""
    config = json.loads(
        (test_data / "configs" / "mirror--medgemma-27b-it" / "config.json").read_text()
    )
    text = {**config["text_config"], "num_hidden_layers": 2, "hidden_size": 64}
    text |= {"intermediate_size": 128, "vocab_size": 96, "num_attention_heads": 2, "head_dim": 32}
    text |= {"num_key_value_heads": 1, "layer_types": ["full_attention"] * 2}
    vision = {**config["vision_config"], "num_hidden_layers": 1, "hidden_size": 64}
    vision |= {"intermediate_size": 128, "num_attention_heads": 2}
    config |= {"text_config": text, "vision_config": vision}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    shapes = {tensor.name: tensor.shape for tensor in build_architecture(config).tensors.values()}
    ones = {name: ("BF16", np.ones(shape, np.uint16)) for name, shape in shapes.items()}
    save_tensors(base / "model.safetensors", ones)
    layers = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if ".language_model.layers." in name and "q_proj.weight" in name
    }
    assert any(".vision_tower." in name and "q_proj.weight" in name for name in shapes)
    tensors = lora_tensors(layers)
    adapter = write_adapter(tmp_path / "a", tensors, base, target_modules=["q_proj"])
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out"))
    assert planned.sources.count()["merged"] == 2
    fewer = {name: entry for name, entry in tensors.items() if ".layers.1." not in name}
    error = refusal(write_adapter(tmp_path / "b", fewer, base, target_modules=["q_proj"]))
    assert "language_model.layers.1.self_attn.q_proj" in error.message


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [name for name in LINEAR if name != "q_proj"]},
        {"target_modules": r".*\.(self_attn\.[kvo]|mlp\.\w+)_proj"},
        {"target_modules": list(LINEAR), "exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_modules_that_were_not_trained(tmp_path, model, tensors, config):
    """PEFT has no place for them: the merged model would not be what it makes of the adapter."""
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], **config))
    assert error.kind == "bad_file"
    assert f"adapter_model.safetensors holds {Q_PROJ}.lora_A.weight and 1 more" in error.message
    assert "target_modules" in error.message and "of different adapters" in error.hint
    named = write_adapter(
        tmp_path / "b", without_module(tensors, "self_attn.q_proj"), model[0], **config
    )
    assert plan_merge(MergeRequest(named, tmp_path / "out")).sources.count()["merged"] == 12


@pytest.mark.parametrize("targets", [None, "all-linear", list(LINEAR), r".*_proj"], ids=str)
def test_modules_that_were_trained_are_merged(tmp_path, model, tensors, targets):
    adapter = write_adapter(tmp_path / "a", tensors, model[0], target_modules=targets)
    assert plan_merge(MergeRequest(adapter, tmp_path / "out")).sources.count()["merged"] == 14


def test_an_embedding_that_was_trained(tmp_path, model, tensors):
    targets = [*LINEAR, "embed_tokens"]
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], target_modules=targets))
    assert f"expected {PREFIX}model.embed_tokens.lora_embedding_A" in error.message


def test_modules_that_were_trained_whole(tmp_path, model, tensors):
    saved = {"modules_to_save": ["lm_head", "classifier", "score"]}
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], **saved))
    assert f"expected {PREFIX}lm_head.weight" in error.message
    assert "modules_to_save" in error.message and "modules_to_save" in error.hint
    tensors[f"{PREFIX}lm_head.weight"] = ("F32", np.ones((96, 64), np.float32))
    adapter = write_adapter(tmp_path / "b", tensors, model[0], **saved)
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out"))  # there are no other two
    assert planned.sources.count()["replaced"] == 1


@pytest.fixture
def biased(tmp_path):
    """A model whose attention has biases."""
    config = write_llama(tmp_path / "biased")
    stored = read_folder(tmp_path / "biased")
    for module, (num_out, _) in linear_layers(config).items():
        if "self_attn" in module:
            stored[f"{module}.bias"] = ("BF16", np.zeros(num_out, np.uint16))
    save_tensors(tmp_path / "biased" / "model.safetensors", stored)
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return tmp_path / "biased"


def test_biases_that_were_trained(tmp_path, biased, tensors):
    error = refusal(write_adapter(tmp_path / "a", tensors, biased, bias="all"))
    assert f"expected {Q_PROJ}.bias and 7 more, as bias in adapter_config.json" in error.message
    for name, (_, values) in read_folder(biased).items():
        if name.endswith(".bias"):
            tensors[f"{PREFIX}{name}"] = ("F32", np.ones(len(values), np.float32))
    adapter = write_adapter(tmp_path / "b", tensors, biased, bias="all")
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out"))
    assert planned.sources.count()["replaced"] == 8


def warnings_of(adapter):
    notes = []
    plan_merge(MergeRequest(adapter, adapter.parent / "out"), on_event=notes.append)
    return [note.text for note in notes if note.level == "warning"]


def test_biases_of_adapted_layers(tmp_path, biased, tensors):
    alone = {name: entry for name, entry in tensors.items() if name.startswith(Q_PROJ)}
    error = refusal(write_adapter(tmp_path / "a", alone, biased, bias="lora_only"))
    assert f"expected {Q_PROJ}.bias, as bias in adapter_config.json" in error.message
    alone[f"{Q_PROJ}.base_layer.bias"] = ("F32", np.ones(64, np.float32))
    adapter = write_adapter(tmp_path / "b", alone, biased, bias="lora_only")
    planned = plan_merge(MergeRequest(adapter, tmp_path / "out"))
    assert planned.sources.count()["replaced"] == 1


def test_patterns_that_match_nothing_are_a_warning(tmp_path, model, tensors):
    patterns = {"q_proj": 16, "qq_proj": 32}
    (text,) = warnings_of(write_adapter(tmp_path / "a", tensors, model[0], alpha_pattern=patterns))
    assert "alpha_pattern 'qq_proj'" in text and "matches no module" in text


# ---- Tensors for the same place ---------------------------------------------------------------


def test_two_factors_of_one_module(tmp_path, model, tensors):
    tensors[f"{Q_PROJ.removeprefix(PREFIX)}.lora_A.weight"] = tensors[f"{Q_PROJ}.lora_A.weight"]
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert error.kind == "bad_file" and "are for the same place" in error.message
    assert f"{Q_PROJ}.lora_A.weight" in error.message


def test_two_tensors_that_replace_one(tmp_path, model, tensors):
    for name in ("lm_head.weight", "lm_head.base_layer.weight"):
        tensors[PREFIX + name] = ("F32", np.ones((96, 64), np.float32))
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert "lm_head.base_layer.weight are for the same place" in error.message


def test_two_names_of_one_weight(tmp_path, model, tensors):
    """With and without the prefix of a class that has the model within it."""
    for part in "AB":
        name = f"{Q_PROJ}.lora_{part}.weight"
        tensors[name.replace("model.layers", "layers")] = tensors[name]
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0]))
    assert "are both for model.layers.0.self_attn.q_proj.weight" in error.message


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_factors_of_another_kind_of_layer(tmp_path, module):
    """Of an embedding they are the other way round: a square weight would take both."""
    write_llama(tmp_path / "square", vocab=64)
    is_embedding = "embed" in module
    names = ("lora_A.weight", "lora_B.weight")
    other = ("lora_embedding_A", "lora_embedding_B")
    found, expected = (names, other) if is_embedding else (other, names)
    shapes = zip(found, ((4, 64), (64, 4)), strict=True)
    tensors = {
        f"{PREFIX}{module}.{name}": ("F32", np.ones(shape, np.float32)) for name, shape in shapes
    }
    error = refusal(write_adapter(tmp_path / "a", tensors, tmp_path / "square"))
    assert error.kind == "bad_file" and f"expected {expected[0]}" in error.message
    assert f"{PREFIX}{module}.{found[0]}" in error.message


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"q_proj(": 16}},
        {"rank_pattern": {"[": 4}},
        {"target_modules": "*q_proj"},
        {"target_modules": [1, 2]},
        {"modules_to_save": "lm_head"},
        {"layers_to_transform": ["0"]},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_read(tmp_path, model, tensors, config):
    error = refusal(write_adapter(tmp_path / "a", tensors, model[0], **config))
    assert error.kind == "bad_file" and f"{next(iter(config))} is" in error.message


CONFIGS = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": r"model\.layers\.\d\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*1\.self_attn.*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "proj"]},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_targets_are_those_of_peft(settings):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = peft.LoraConfig(**settings)
    modules = [name.removesuffix(".weight") for name in llama_shapes(llama_config())]
    for module in modules:
        theirs = check_target_module_exists(config, module)
        expected = bool(theirs) and not isinstance(theirs, _ExcludedModule)
        assert is_target(settings, module, is_linear=True) == expected, module
