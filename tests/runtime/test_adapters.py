"""PEFT adapters over packed layers equal the same adapter over the dequantized model."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtool.errors import QtoolError, in_words
from qtool.events import Event, Note
from qtool.runtime import requirements
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders

peft = pytest.importorskip("peft")

PROMPT = torch.arange(3, 19)[None]


def save_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """A LoRA adapter with random weights in both matrices, made over the plain model."""
    torch.manual_seed(11)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dequantized_model(packed: Any, source: Path) -> Any:
    """The stock model with our dequantized weights in its plain layers."""
    model = plain_model(source)
    for name, module in packed.named_modules():
        if isinstance(module, (Linear4bit, LinearInt8)):
            target = model.get_submodule(name)
            weight = module.dequantize().float()
            target.weight.data = weight if isinstance(target, torch.nn.Linear) else weight.T
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits.float()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("TinyStories-656K-hf", {"target_modules": "all-linear"}),
        ("stories260K-hf", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("slm4096-gpt2-hf", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("TinyStories-656K-hf", {"target_modules": ["up_proj"], "use_dora": True}),
    ],
    ids=["all-linear", "some", "conv1d", "dora"],
)
@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_equals_the_adapter_over_the_dequantized_model(
    packed_folders: PackedFolders,
    tmp_path: Path,
    model: str,
    settings: dict[str, Any],
    precision: str,
) -> None:
    source = packed_folders.sources / model
    folder = packed_folders.by_qtool(model, precision)
    adapter = save_adapter(plain_model(source), tmp_path / "adapter", **settings)
    options = LoadOptions(device="cpu", compute_dtype="float32")
    without = load_model(str(folder), options).model
    expected = peft.PeftModel.from_pretrained(dequantized_model(without, source), adapter).eval()
    options = LoadOptions(device="cpu", compute_dtype="float32", adapter=adapter)
    found = load_model(str(folder), options).model
    assert any(isinstance(m, (Linear4bit, LinearInt8)) for m in found.modules())
    spread = logits(expected).std()
    assert (logits(found) - logits(expected)).abs().max() < 1e-4 * spread
    assert (logits(found) - logits(without)).abs().max() > 0.01 * spread, "no effect"


def test_adapter_over_a_full_precision_model(packed_folders: PackedFolders, tmp_path: Path) -> None:
    source = packed_folders.sources / "TinyStories-656K-hf"
    adapter = save_adapter(plain_model(source), tmp_path / "a", target_modules="all-linear")
    options = LoadOptions(device="cpu", adapter=adapter)
    found = load_model(str(source), options).model
    expected = peft.PeftModel.from_pretrained(plain_model(source), adapter).eval()
    assert torch.allclose(logits(found), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["nf4-dq", None])
def test_training_beside_packed_weights_is_told_over_others(
    packed_folders: PackedFolders, adapter: Path, trained: str | None
) -> None:
    if trained:
        record = {"model": {"id": "m", "quant": trained}}
        (adapter / "qtool_finetune.json").write_text(json.dumps(record))
    source = packed_folders.sources / "TinyStories-656K-hf"
    for quant in (None, "nf4-dq"):
        events: list[Event] = []
        options = LoadOptions(quant, device="cpu", adapter=adapter)
        load_model(str(source), options, on_event=events.append)
        texts = [in_words(event.text) for event in events if isinstance(event, Note)]
        told = [text for text in texts if "was trained against nf4-dq weights" in text]
        assert len(told) == (trained is not None and quant is None)


# ---- What does not fit ------------------------------------------------------------------------


@pytest.fixture
def adapter(packed_folders: PackedFolders, tmp_path: Path) -> Path:
    source = packed_folders.sources / "TinyStories-656K-hf"
    return save_adapter(plain_model(source), tmp_path / "ok", target_modules=["up_proj"])


def load_with(packed_folders: PackedFolders, adapter: Path, model: str) -> None:
    folder = packed_folders.by_qtool(model, "nf4")
    load_model(str(folder), LoadOptions(device="cpu", adapter=adapter))


def test_an_adapter_of_another_model_is_refused(
    packed_folders: PackedFolders, adapter: Path
) -> None:
    with pytest.raises(QtoolError, match="does not fit the model") as caught:
        load_with(packed_folders, adapter, "stories260K-hf")
    assert caught.value.kind == "bad_file" and "\n" not in caught.value.message
    assert re.search(
        r"lora_[AB].weight: expected shape \[4, 64\], found \[4, \d+\]|"
        r"lora_[AB].weight: expected shape \[\d+, 4\], found",
        caught.value.message,
    )


def test_what_peft_says_of_another_model_does_not_hide_that_it_is_one(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    source = packed_folders.sources / "TinyStories-656K-hf"
    settings = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_dropout": 0.1}
    adapter = save_adapter(plain_model(source), tmp_path / "a", **settings)
    with pytest.raises(QtoolError, match="does not fit the model: the model has no ") as caught:
        moe = packed_folders.sources / "tinymoe-6m"
        load_model(str(moe), LoadOptions(device="cpu", adapter=adapter))
    assert "model.layers.0.mlp." in caught.value.message and "lora_dropout" in caught.value.message


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_refused(
    packed_folders: PackedFolders, adapter: Path, file: str
) -> None:
    (adapter / file).unlink()
    with pytest.raises(QtoolError, match=f"holds no {file}"):
        load_with(packed_folders, adapter, "TinyStories-656K-hf")


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("adapter_model.safetensors", 100, "it is truncated"),
        ("adapter_model.safetensors", 3, "expected"),
        ("adapter_config.json", 20, "expected JSON"),
        ("adapter_config.json", 0, "expected JSON"),
    ],
)
def test_a_cut_file_is_noticed_before_the_model_is_opened(
    adapter: Path, file: str, size: int, message: str
) -> None:
    os.truncate(adapter / file, size)
    with pytest.raises(QtoolError, match=message) as caught:
        load_model("no/such-model", LoadOptions(device="cpu", adapter=adapter))
    assert caught.value.kind == "bad_file" and str(adapter / file) in caught.value.message


def test_a_config_that_peft_cannot_read_is_told_from_one_that_does_not_fit(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for peft_type in ("NONE_SUCH", 3):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": peft_type}))
        with pytest.raises(QtoolError, match="PEFT cannot read it") as caught:
            load_model("no/such-model", LoadOptions(device="cpu", adapter=adapter))
        assert caught.value.kind == "bad_file"


def test_an_adapter_with_a_missing_tensor_is_refused(
    packed_folders: PackedFolders, adapter: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    dropped = next(name for name in tensors if "lora_B" in name)
    del tensors[dropped]
    save_file(tensors, path)
    with pytest.raises(QtoolError, match=r"the adapter lacks .*lora_B"):
        load_with(packed_folders, adapter, "TinyStories-656K-hf")


def test_an_adapter_with_a_tensor_too_many_is_refused(
    packed_folders: PackedFolders, adapter: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    extra = next(name for name in tensors if "lora_B" in name).replace("up_proj", "no_proj")
    save_file(tensors | {extra: torch.ones(2, 2)}, path)
    with pytest.raises(QtoolError, match=r"no place for .*no_proj"):
        load_with(packed_folders, adapter, "TinyStories-656K-hf")


def test_a_learned_prompt_is_refused(packed_folders: PackedFolders, adapter: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="learn a prompt"):
        load_with(packed_folders, adapter, "TinyStories-656K-hf")


def test_missing_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QtoolError, match="adapter needs peft") as caught:
        requirements.require_peft()
    assert caught.value.hint == "pip install peft"
