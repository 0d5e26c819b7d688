"""Our layers inside transformers' own from_pretrained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qtool.errors import QtoolError
from qtool.runtime.drop_in import METHODS, BitsAndBytesQuantizer, register, unregister
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders, bitsandbytes_config, edit_config, edit_tensors
from tests.runtime.test_bitsandbytes_folders import assert_same_weights, bnb, load_stock

MODEL = "TinyStories-656K-hf"
UP_PROJ = "model.layers.0.mlp.up_proj"


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"device_map": "cpu"} | kwargs)


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize("model", [MODEL, "slm4096-gpt2-hf", "tinylm-19m"])
@pytest.mark.parametrize("writer", ["by_bitsandbytes", "by_qtool"])
def test_same_tensors_as_our_own_loader_and_values_as_bitsandbytes(
    packed_folders: PackedFolders, writer: str, model: str, precision: str
) -> None:
    folder = getattr(packed_folders, writer)(model, precision)
    stock = load_stock(folder)
    register()
    try:
        found = from_pretrained(folder)
    finally:
        unregister()
    assert isinstance(found.hf_quantizer, BitsAndBytesQuantizer)
    assert_same_weights(found, stock)
    expected = load_model(str(folder), LoadOptions(device="cpu")).model.state_dict()
    tensors = found.state_dict()
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_other_storage_dtypes(
    packed_folders: PackedFolders, registered: None, storage: str
) -> None:
    folder = packed_folders.by_bitsandbytes(MODEL, "nf4-dq", storage=storage)
    expected = load_model(str(folder), LoadOptions(device="cpu")).model.state_dict()
    found = from_pretrained(folder).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_not_packed_follows_the_dtype(
    packed_folders: PackedFolders, registered: None
) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4-dq")  # norms in float32
    model = from_pretrained(folder, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.get_submodule(UP_PROJ).nested_absmax.dtype == torch.float32


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_any_device_map(packed_folders: PackedFolders, registered: None, device_map: Any) -> None:
    model = from_pretrained(packed_folders.by_qtool(MODEL, "nf4-dq"), device_map=device_map)
    assert model(torch.tensor([[1, 2, 3]], device=model.device)).logits.isfinite().all()


def test_layers_on_disk_give_the_same_logits(
    packed_folders: PackedFolders, registered: None, tmp_path: Path
) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4-dq")
    tokens = torch.tensor([[1, 2, 3]])
    expected = from_pretrained(folder)(tokens).logits
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    spread = from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path, offload_buffers=True
    )
    assert torch.equal(spread(tokens).logits, expected)


def test_registering_twice_is_once_and_can_be_taken_back() -> None:
    before = {method: AUTO_QUANTIZER_MAPPING[method] for method in METHODS}
    unregister()
    assert {method: AUTO_QUANTIZER_MAPPING[method] for method in METHODS} == before
    register()
    register()
    assert all(AUTO_QUANTIZER_MAPPING[method] is not before[method] for method in METHODS)
    unregister()
    assert {method: AUTO_QUANTIZER_MAPPING[method] for method in METHODS} == before


def test_a_full_precision_model_is_left_to_bitsandbytes(
    packed_folders: PackedFolders, registered: None
) -> None:
    config = bitsandbytes_config("nf4", compute_dtype="float32")
    model = from_pretrained(packed_folders.sources / MODEL, quantization_config=config)
    assert isinstance(model.get_submodule(UP_PROJ), bnb.nn.Linear4bit)


def test_saving_says_why_not(
    packed_folders: PackedFolders,
    registered: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = from_pretrained(packed_folders.by_qtool(MODEL, "int8"))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "copy the folder that was loaded" in caplog.text


@pytest.mark.parametrize(("precision", "kind"), [("nf4-dq", Linear4bit), ("int8", LinearInt8)])
def test_adapters_are_trained_over_the_layers(
    packed_folders: PackedFolders, registered: None, precision: str, kind: type
) -> None:
    base = from_pretrained(packed_folders.by_qtool(MODEL, precision))
    model = get_peft_model(base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    layer = base.get_submodule(UP_PROJ)
    assert isinstance(layer.base_layer, kind)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_damaged_folder_is_refused_as_by_our_own_loader(
    packed_folders: PackedFolders, registered: None, tmp_path: Path
) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP_PROJ}.weight.absmax"] = tensors[f"{UP_PROJ}.weight.absmax"][:-1].clone()

    folder = edit_tensors(packed_folders.by_qtool(MODEL, "nf4"), tmp_path / "bad", shorten)
    with pytest.raises(QtoolError, match=r"absmax.*elements"):
        from_pretrained(folder)


@pytest.mark.parametrize(("precision", "name"), [("nf4", "weight.absmax"), ("int8", "SCB")])
def test_nan_in_a_statistic_is_refused(
    packed_folders: PackedFolders, registered: None, tmp_path: Path, precision: str, name: str
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP_PROJ}.{name}"][1] = float("nan")

    folder = edit_tensors(packed_folders.by_qtool(MODEL, precision), tmp_path / "bad", spoil)
    with pytest.raises(QtoolError, match="NaN or infinity"):
        from_pretrained(folder)


def test_a_config_of_another_model_is_refused(
    packed_folders: PackedFolders, registered: None, tmp_path: Path
) -> None:
    folder = edit_config(
        packed_folders.by_qtool(MODEL, "nf4"), tmp_path / "other", intermediate_size=512
    )
    with pytest.raises(QtoolError, match=r"config\.json implies shape"):
        from_pretrained(folder)


def test_a_state_dict_is_refused(packed_folders: PackedFolders, registered: None) -> None:
    folder = packed_folders.by_qtool(MODEL, "nf4")
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(QtoolError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})
