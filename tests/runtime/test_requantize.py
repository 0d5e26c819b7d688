"""Weights packed where they lie: the bytes that `qtool quantize` writes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.errors import QtoolError
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.loading import LoadOptions, load_model
from tests.runtime.folders import PackedFolders
from tests.runtime.packed_layers import QUANTS, make_layer

MODEL = "stories260K-hf"  # widths that are no multiple of a block


def float_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def packed_layers(folder: Path) -> dict[str, Any]:
    model = load_model(str(folder), LoadOptions(device="cpu")).model
    return {n: m for n, m in model.named_modules() if isinstance(m, (Linear4bit, LinearInt8))}


def bytes_of(layer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("quant", QUANTS)
def test_equals_what_quantize_writes(packed_folders: PackedFolders, quant: str) -> None:
    layers = packed_layers(packed_folders.by_qtool(MODEL, quant))
    weights = float_weights(packed_folders.sources / MODEL)
    assert len(layers) > 10
    for name, layer in layers.items():
        expected = bytes_of(layer)
        layer.requantize(torch.zeros(layer.out_features, layer.in_features))
        assert not torch.equal(layer.weight.cpu(), expected["weight"]), "the test can fail"
        layer.requantize(weights[f"{name}.weight"])
        for part, tensor in bytes_of(layer).items():
            assert torch.equal(tensor, expected[part]), f"{name}.{part}"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_takes_any_dtype_and_keeps_its_own_memory(quant: str, dtype: torch.dtype) -> None:
    layer = make_layer(quant, 37, 22)
    addresses = [tensor.data_ptr() for tensor in layer.state_dict().values()]
    weight = torch.randn(22, 37, generator=torch.Generator().manual_seed(1)).to(dtype).t()
    assert not weight.is_contiguous()
    layer.requantize(weight)
    error = (layer.dequantize().float() - weight.float()).norm() / weight.float().norm()
    assert error < (0.02 if quant == "int8" else 0.15)
    assert [tensor.data_ptr() for tensor in layer.state_dict().values()] == addresses


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_leave_the_layer_alone(quant: str, value: float) -> None:
    layer = make_layer(quant, 37, 22)
    before = bytes_of(layer)
    weight = torch.randn(37, 22)
    weight[36, 21] = value  # in the last, shortened block
    with pytest.raises(QtoolError, match="NaN or infinite") as caught:
        layer.requantize(weight)
    assert caught.value.kind == "bad_file"
    assert all(torch.equal(tensor, before[name]) for name, tensor in bytes_of(layer).items())


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \[37, 22\], found \[22, 37\]"):
        make_layer("nf4", 37, 22).requantize(torch.randn(22, 37))


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", [(37, 22), (256, 512), (1024, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bytes_on_a_gpu(quant: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    on_cpu, on_gpu = make_layer(quant, *shape), make_layer(quant, *shape, device="cuda")
    on_cpu.requantize(weight)
    on_gpu.requantize(weight.cuda())
    for name, tensor in bytes_of(on_gpu).items():
        assert torch.equal(tensor, bytes_of(on_cpu)[name]), name
    assert torch.equal(on_gpu.dequantize().cpu(), on_cpu.dequantize())
    weight[-1, -1] = float("nan")
    with pytest.raises(QtoolError, match="NaN or infinite"):
        on_gpu.requantize(weight.cuda())
