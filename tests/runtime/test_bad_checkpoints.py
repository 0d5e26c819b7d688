"""Folders that must not load, each with its own sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.errors import QtoolError
from qtool.events import Started
from qtool.runtime.loading import LoadOptions, load_model
from qtool.runtime.model_config import require_runnable
from qtool.runtime.requirements import require_model
from tests.runtime.folders import PackedFolders, edit_config, edit_tensors

MODEL = "TinyStories-656K-hf"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
SCB = WEIGHT.replace("weight", "SCB")

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> None:
    load_model(str(folder), LoadOptions(device="cpu"))


def edit_state(tensors: Tensors, **changes: object) -> None:
    state = json.loads(tensors[STATE].numpy().tobytes())
    blob = json.dumps(state | changes).encode()
    tensors[STATE] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def fill(name: str, value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name].view(-1)[1] = value

    return edit


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


def shorten(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1].clone()

    return edit


BAD_NF4_DQ = {
    "missing absmax": (drop(f"{WEIGHT}.absmax"), "absmax.*missing"),
    "missing nested_absmax": (drop(f"{WEIGHT}.nested_absmax"), "nested_absmax.*missing"),
    "missing quant_map": (drop(f"{WEIGHT}.quant_map"), "quant_map.*missing"),
    "missing nested_quant_map": (drop(f"{WEIGHT}.nested_quant_map"), "nested_quant_map.*missing"),
    "missing quant_state": (drop(STATE), "lacks its quant_state"),
    "missing weight": (drop(WEIGHT), "statistics of a packed weight that is not there"),
    "short absmax": (shorten(f"{WEIGHT}.absmax"), "absmax.*elements"),
    "short nested_absmax": (shorten(f"{WEIGHT}.nested_absmax"), "nested_absmax.*elements"),
    "short packed weight": (shorten(WEIGHT), "up_proj.weight.*bytes"),
    "NaN in nested_absmax": (fill(f"{WEIGHT}.nested_absmax", float("nan")), "NaN or infinity"),
    "another code table": (fill(f"{WEIGHT}.quant_map", 0.5), "not the code table of nf4"),
    "unknown key": (lambda t: edit_state(t, extra=1), "extra"),
    "unknown type": (lambda t: edit_state(t, quant_type="int4"), "quant_type"),
    "block size 63": (lambda t: edit_state(t, blocksize=63), "blocksize"),
    "another shape": (lambda t: edit_state(t, shape=[8, 8]), "packed size|bytes|elements"),
    "transposed shape": (
        lambda t: edit_state(t, shape=json.loads(t[STATE].numpy().tobytes())["shape"][::-1]),
        r"up_proj\.weight: config.json implies shape \[384, 128\], found \[128, 384\]",
    ),
    "infinite offset": (lambda t: edit_state(t, nested_offset=float("inf")), "NaN or infinity"),
    "no norm": (drop("model.norm.weight"), "model.norm.weight is in no file"),
    "norm of another size": (
        shorten("model.norm.weight"),
        r"model\.norm\.weight: config.json implies shape",
    ),
}


@pytest.mark.parametrize("case", BAD_NF4_DQ)
def test_bad_four_bit_folder_is_refused(
    packed_folders: PackedFolders, tmp_path: Path, case: str
) -> None:
    edit, message = BAD_NF4_DQ[case]
    folder = edit_tensors(packed_folders.by_qtool(MODEL, "nf4-dq"), tmp_path / "bad", edit)
    with pytest.raises(QtoolError, match=message) as caught:
        load(folder)
    assert caught.value.kind in ("bad_file", "unsupported")
    assert caught.value.hint
    if "norm" not in case and "transposed" not in case:
        assert "model.safetensors" in str(caught.value)
        assert WEIGHT in str(caught.value)


BAD_INT8 = {
    "missing SCB": (drop(SCB), "weight_format|statistics of a packed weight"),
    "NaN in SCB": (fill(SCB, float("nan")), "NaN or infinity"),
    "short SCB": (shorten(SCB), "SCB.*elements"),
    "column format": (
        lambda t: t.update({f"{WEIGHT}_format": torch.tensor(2, dtype=torch.uint8)}),
        "weight_format is 2",
    ),
}


@pytest.mark.parametrize("case", BAD_INT8)
def test_bad_int8_folder_is_refused(
    packed_folders: PackedFolders, tmp_path: Path, case: str
) -> None:
    edit, message = BAD_INT8[case]
    folder = edit_tensors(packed_folders.by_qtool(MODEL, "int8"), tmp_path / "bad", edit)
    with pytest.raises(QtoolError, match=message):
        load(folder)


def test_int8_without_weight_format_loads(packed_folders: PackedFolders, tmp_path: Path) -> None:
    def drop_all(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_format")]:
            del tensors[name]

    folder = packed_folders.by_qtool(MODEL, "int8")
    load(edit_tensors(folder, tmp_path / "old", drop_all))


def quantization_entry(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())
    return dict(config["quantization_config"])


def test_int8_with_16_bit_weights_is_refused_with_the_reason(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = packed_folders.by_qtool(MODEL, "int8")
    entry = quantization_entry(folder) | {"llm_int8_has_fp16_weight": True}
    with pytest.raises(QtoolError, match="quantized anew in every forward"):
        load(edit_config(folder, tmp_path / "bad", quantization_config=entry))


def test_another_quantization_method_is_refused(models: Path, tmp_path: Path) -> None:
    folder = edit_config(
        models / MODEL, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(QtoolError, match="'gptq', expected bitsandbytes"):
        load(folder)


def test_a_config_that_says_packed_over_plain_weights_is_refused(
    packed_folders: PackedFolders, models: Path, tmp_path: Path
) -> None:
    entry = quantization_entry(packed_folders.by_qtool(MODEL, "nf4"))
    folder = edit_config(models / MODEL, tmp_path / "plain", quantization_config=entry)
    with pytest.raises(QtoolError, match="no packed weight"):
        load(folder)


def test_packed_weights_without_a_config_entry_load(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4")
    load(edit_config(folder, tmp_path / "silent", quantization_config=None))


def test_an_unknown_model_type_is_refused(models: Path, tmp_path: Path) -> None:
    folder = edit_config(models / MODEL, tmp_path / "unknown", model_type="no_such_model")
    with pytest.raises(QtoolError, match="'no_such_model', which this transformers"):
        load(folder)


def test_a_model_that_makes_no_text_is_refused(models: Path, tmp_path: Path) -> None:
    folder = edit_config(models / MODEL, tmp_path / "vit", model_type="vit")
    with pytest.raises(QtoolError, match="do not generate text"):
        load(folder)


def test_code_named_by_a_config_is_never_run(models: Path, tmp_path: Path) -> None:
    folder = edit_config(
        models / MODEL,
        tmp_path / "code",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        _attn_implementation_internal="someone/kernels",
        attn_implementation="someone/kernels",
    )
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    load(folder)
    assert not marker.exists()


def copy_of(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / MODEL, tmp_path / "copy", copy_function=shutil.copyfile))


def test_a_folder_without_a_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(models / MODEL, folder, ignore=shutil.ignore_patterns("token*", "special*"))
    refusal = pytest.raises(QtoolError, match="no usable tokenizer: transformers finds none among")
    with refusal:
        load(folder)
    # A type whose class makes one of no file, that knows no word.
    edit_config(folder, tmp_path / "empty", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with refusal:
        load(tmp_path / "empty")


def test_a_broken_tokenizer_is_named(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(QtoolError, match="no usable tokenizer") as caught:
        load(folder)
    assert "again" in caught.value.hint  # not that it is missing


def test_a_tokenizer_that_brings_its_own_code_is_called_that(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models, tmp_path)
    path = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(QtoolError, match=r"no usable tokenizer: .* custom code") as caught:
        load(folder)
    assert caught.value.kind == "unsupported"
    assert "no code that comes with a model" in caught.value.hint


def test_a_text_in_the_place_of_the_model_is_refused_as_one() -> None:
    """No file has so long a name."""
    with pytest.raises(QtoolError, match="no such folder") as caught:
        require_model("Once upon a time " * 20)
    assert caught.value.kind == "not_found"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizers_file_that_is_no_json_is_named(
    models: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_of(models, tmp_path)
    (folder / name).write_text("{\n")
    with pytest.raises(QtoolError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / name}: expected JSON, found an error")
    assert "line 2 column 1" in str(caught.value)
    assert caught.value.kind == "bad_file"
    assert caught.value.hint.startswith(f"fetch {name} again")


BAD_GENERATION = {
    "{": "expected JSON, found an error: Expecting property name",
    "": "expected JSON, found an error: Expecting value",
    "[]": "expected a JSON object, found an array",
    '{"eos_token_id": "x"}': "eos_token_id: expected a whole number or a list of them, found 'x'",
    '{"eos_token_id": [1, "x"]}': "eos_token_id: expected a whole number or a list of them",
    '{"eos_token_id": true}': "eos_token_id: expected a whole number or a list of them, found True",
}


@pytest.mark.parametrize("text", BAD_GENERATION)
def test_a_broken_generation_config_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = copy_of(models, tmp_path)
    (folder / "generation_config.json").write_text(text)
    monkeypatch.delattr("qtool.runtime.loading._open_weights")  # told before
    with pytest.raises(QtoolError) as caught:
        load(folder)
    assert str(caught.value).startswith(
        f"{folder / 'generation_config.json'}: {BAD_GENERATION[text]}"
    )
    assert caught.value.kind == "bad_file"
    assert "remove it" in caught.value.hint


HARMLESS_GENERATION = (
    "{}",
    '{"eos_token_id": null}',
    '{"eos_token_id": [7, 9]}',
    '{"eos_token_id": [7, null, 9]}',
    '{"top_k": 1, "top_k": 2, "typical_p": NaN, "eos_token_id": [7, 9]}',
    None,
)


@pytest.mark.parametrize("text", HARMLESS_GENERATION)
def test_a_whole_generation_config_or_none_loads(
    models: Path, tmp_path: Path, text: str | None
) -> None:
    folder = copy_of(models, tmp_path)
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    ids = load_model(str(folder), LoadOptions(device="cpu")).eos_token_ids
    assert ids == ((7, 9, 2) if "7" in (text or "") else (2,))


def test_what_transformers_makes_nothing_of_is_a_warning(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("no such strategy")

    folder = copy_of(models, tmp_path)
    monkeypatch.setattr("transformers.GenerationConfig.from_pretrained", refuse)
    notes: list[object] = []
    load_model(str(folder), LoadOptions(device="cpu"), on_event=notes.append)
    assert any("generation_config.json: transformers does not" in str(note) for note in notes)


@pytest.mark.parametrize("precision", [None, "nf4-dq"])
def test_a_missing_layer_is_told_before_weights_are_read(
    packed_folders: PackedFolders, models: Path, tmp_path: Path, precision: str | None
) -> None:
    source = packed_folders.by_qtool(MODEL, precision) if precision else models / MODEL
    config = json.loads((source / "config.json").read_text())
    more = config["num_hidden_layers"] + 1
    folder = edit_config(source, tmp_path / "more", num_hidden_layers=more)
    events: list[object] = []
    with pytest.raises(QtoolError) as caught:
        load_model(str(folder), LoadOptions(device="cpu"), on_event=events.append)
    first = f"model.layers.{more - 1}.input_layernorm.weight"
    assert str(caught.value) == f"{folder}: {first} and 8 more are in no file"
    assert not any(isinstance(event, Started) for event in events)
    with pytest.raises(QtoolError, match="and 8 more are in no file"):
        require_runnable(require_model(str(folder)))  # so no weights are fetched either


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "config.json: num_attention_heads: expected a whole number"),
        ({"dtype": "float7"}, "config.json: dtype: expected the name of a dtype, found 'float7'"),
        (
            {"rope_parameters": {"rope_type": "nope", "rope_theta": 10000.0}},
            "cannot build the LlamaForCausalLM of this config.json: it knows no 'nope'",
        ),
        ({"hidden_act": "no_such"}, "cannot build the LlamaForCausalLM .*no_such"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(
    models: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = edit_config(models / MODEL, tmp_path / "wrong", **changes)
    with pytest.raises(QtoolError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and caught.value.kind == "bad_file"


def test_whole_numbers_are_no_weights(models: Path, tmp_path: Path) -> None:
    def scale(tensors: Tensors) -> None:
        tensors[WEIGHT] = (tensors[WEIGHT] * 100).to(torch.int32)

    folder = edit_tensors(models / MODEL, tmp_path / "whole", scale)
    with pytest.raises(QtoolError, match=rf"{WEIGHT}: expected .* found dtype I32") as caught:
        load(folder)
    assert "model.safetensors" in str(caught.value) and caught.value.kind == "unsupported"


def test_what_headers_do_not_show_is_told_once_weights_are_read(
    models: Path, tmp_path: Path
) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["model.layers.1.input_norm.weight"] = tensors.pop(
            "model.layers.1.input_layernorm.weight"
        )

    folder = edit_tensors(models / MODEL, tmp_path / "renamed", rename)
    with pytest.raises(QtoolError, match=r"layers\.1\.input_layernorm\.weight is in no file"):
        load(folder)


@pytest.mark.parametrize("precision", [None, "nf4-dq", "int8"])
def test_another_shape_is_told_with_its_file(
    packed_folders: PackedFolders, models: Path, tmp_path: Path, precision: str | None
) -> None:
    source = packed_folders.by_qtool(MODEL, precision) if precision else models / MODEL
    width = json.loads((source / "config.json").read_text())["intermediate_size"]
    folder = edit_config(source, tmp_path / "wide", intermediate_size=2 * width)
    place = re.escape(f"{folder}: model.safetensors: model.layers.0.mlp.")
    with pytest.raises(QtoolError, match=place + r"\w+.weight: config.json implies shape"):
        load(folder)


def test_tensors_beside_the_model_are_a_warning(models: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["vision.weight"] = torch.ones(2, 2)

    folder = edit_tensors(models / MODEL, tmp_path / "more", add)
    notes: list[object] = []
    load_model(str(folder), LoadOptions(device="cpu"), on_event=notes.append)
    assert any("vision.weight is stored, but not part" in str(note) for note in notes)
