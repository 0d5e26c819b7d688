"""`--quant` while loading gives the bytes that `qtool quantize` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime.linear import Linear4bit
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders, edit_tensors


@pytest.mark.parametrize("precision", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize(
    "model", ["stories260K-hf", "TinyStories-656K-hf", "slm4096-gpt2-hf", "tinylm-19m"]
)
def test_same_bytes_as_the_quantized_folder(
    packed_folders: PackedFolders, model: str, precision: str
) -> None:
    folder = packed_folders.by_qtool(model, precision)
    stored = load_model(str(folder), LoadOptions(device="cpu")).model.state_dict()
    source = str(packed_folders.sources / model)
    made = load_model(source, LoadOptions(quant=precision, device="cpu")).model.state_dict()
    assert set(made) == set(stored)
    for name, tensor in made.items():
        assert tensor.dtype == stored[name].dtype, name
        assert torch.equal(tensor, stored[name]), name


def test_float32_weights_are_quantized_before_anything_rounds_them(
    packed_folders: PackedFolders,
) -> None:
    source = str(packed_folders.sources / "TinyStories-656K-hf")
    plain = load_model(source, LoadOptions(quant="nf4", device="cpu")).model
    rounded = LoadOptions(quant="nf4", compute_dtype="bfloat16", device="cpu")
    in_bfloat16 = load_model(source, rounded).model
    name = "model.layers.0.mlp.up_proj"
    weights = [m.get_submodule(name).weight for m in (plain, in_bfloat16)]
    assert torch.equal(*weights)
    assert in_bfloat16.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_packed_model_is_not_quantized_again(packed_folders: PackedFolders) -> None:
    folder = packed_folders.by_qtool("stories260K-hf", "nf4")
    with pytest.raises(QtoolError, match="quantized already"):
        load_model(str(folder), LoadOptions(quant="int8", device="cpu"))


def test_mixtures_of_experts_run_as_they_are_but_are_not_quantized(models: Path) -> None:
    folder = str(models / "tinymoe-6m")
    with pytest.raises(QtoolError, match="is a mixture of 8 experts") as caught:
        load_model(folder, LoadOptions(quant="nf4-dq", device="cpu"))
    assert caught.value.kind == "unsupported"
    assert load_model(folder, LoadOptions(device="cpu")).num_packed_layers == 0


def test_nan_in_a_weight_is_named(models: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")

    folder = edit_tensors(models / "TinyStories-656K-hf", tmp_path / "bad", spoil)
    with pytest.raises(QtoolError, match=r"layers\.0\.mlp\.up_proj\.weight.*not finite"):
        load_model(str(folder), LoadOptions(quant="nf4-dq", device="cpu"))


def test_loading_releases_the_source_of_each_layer(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    """Quantizing on load must not keep the anonymous files of layers that went elsewhere."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    source = str(packed_folders.sources / "TinyStories-656K-hf")
    loaded = load_model(source, LoadOptions(quant="nf4-dq", device="cpu"))
    num_held = maps.read_text().count("memfd:qtool")
    assert num_held <= loaded.num_packed_layers
    for module in loaded.model.modules():
        if isinstance(module, Linear4bit):
            module.weight.data = module.weight.data.clone()
    assert maps.read_text().count("memfd:qtool") == 0
