"""The packed linear layers as modules: products, pieces, dtypes, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qtool.runtime import linear, products_host
from qtool.runtime.linear import FourBitLayer, Int8Layer, Linear4bit, LinearInt8, build_linear

OUT, IN = 37, 22  # 814 weights: no whole number of blocks, blocks straddle rows
WHOLE_IN = 128  # rows of whole blocks


def filled(
    columns: int = IN, *, double_quant: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Linear4bit:
    torch.manual_seed(3)
    layer = Linear4bit(
        FourBitLayer(OUT, columns, "nf4", 64, dtype, double_quant),
        bias=torch.randn(OUT, dtype=dtype),
    )
    layer.weight.data.random_(0, 256)
    if double_quant:
        layer.absmax.random_(0, 256)
        layer.nested_absmax.uniform_(0.1, 1)
        layer.nested_quant_map.copy_(torch.linspace(-1, 1, 256))
        layer.nested_offset.fill_(1.5)
    else:
        layer.absmax.uniform_(0.1, 1)
    return layer


def filled_int8(columns: int = IN) -> LinearInt8:
    torch.manual_seed(4)
    layer = LinearInt8(Int8Layer(OUT, columns), bias=torch.randn(OUT))
    layer.weight.data.random_(-127, 128)
    layer.SCB.uniform_(0.1, 1)
    return layer


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_multiplies_the_dequantized_weight(double_quant: bool, dtype: torch.dtype) -> None:
    layer = filled(double_quant=double_quant, dtype=dtype)
    x = torch.randn(2, 5, IN).to(dtype)
    expected = functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (2, 5, OUT)


def test_int8_forward_multiplies_the_dequantized_weight() -> None:
    layer = filled_int8()
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), functional.linear(x, layer.dequantize(), layer.bias))


def test_compute_dtype_is_used_inside_and_the_input_dtype_returned() -> None:
    layer = filled()
    layer.compute_dtype = torch.float32
    x = torch.randn(3, IN).bfloat16()
    expected = functional.linear(x.float(), layer.dequantize().float(), layer.bias.float())
    assert torch.equal(layer(x), expected.bfloat16())


@pytest.mark.parametrize("max_elements", [1, 3 * WHOLE_IN, 10 * WHOLE_IN])
@pytest.mark.parametrize("kind", ["4bit", "int8"])
def test_many_tokens_are_multiplied_with_pieces_of_rows(
    monkeypatch: pytest.MonkeyPatch, max_elements: int, kind: str
) -> None:
    """A few go straight through the packed bytes, of which rows of whole groups allow it."""
    layer = filled(WHOLE_IN, dtype=torch.float32) if kind == "4bit" else filled_int8(WHOLE_IN)
    few = torch.randn(products_host.MAX_HOST_PACKED_TOKENS, WHOLE_IN)
    many = torch.cat((few, few[:1]))
    sizes = watch_dequantized_sizes(monkeypatch)
    expected = layer(few)
    assert not sizes
    monkeypatch.setattr(products_host, "MAX_HOST_ELEMENTS", max_elements)
    found = layer(many)
    torch.testing.assert_close(found, torch.cat((expected, expected[:1])), rtol=1e-4, atol=1e-4)
    assert max(sizes) == max(max_elements // WHOLE_IN, 1) * WHOLE_IN
    assert sum(sizes) == OUT * WHOLE_IN


def watch_dequantized_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list to which products on the CPU add the number of elements of each piece."""
    sizes: list[int] = []

    def watched(dequantize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            values = dequantize(*args, **kwargs)
            sizes.append(values.numel())
            return values

        return call

    for name in ("dequantize_4bit", "dequantize_int8"):
        monkeypatch.setattr(products_host, name, watched(getattr(products_host, name)))
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_keep_their_dtype_when_the_model_is_converted(dtype: torch.dtype) -> None:
    model = nn.Sequential(filled(), filled(double_quant=False), filled_int8())
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.to(dtype)
    for name, tensor in model.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    assert model[0].bias.dtype == dtype
    assert model[0].weight.dtype == torch.uint8


def test_gradients_reach_the_input_and_no_packed_weight() -> None:
    layer = filled(dtype=torch.float32)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(3, OUT) @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected)
    assert layer.weight.grad is None


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["4bit", "int8"])
def test_autocast_holds_for_packed_layers_as_for_others(
    kind: str, compute_dtype: torch.dtype | None
) -> None:
    layer = filled() if kind == "4bit" else filled_int8()
    layer.compute_dtype = compute_dtype
    plain = nn.Linear(IN, OUT)
    plain.weight.data, plain.bias.data = layer.dequantize().float(), layer.bias.float()
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), plain(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("max_elements", [1, 3 * WHOLE_IN, 1 << 22])
@pytest.mark.parametrize("kind", ["4bit", "int8"])
def test_products_and_gradients_are_added_to_what_is_there(
    monkeypatch: pytest.MonkeyPatch, max_elements: int, kind: str
) -> None:
    layer = filled(WHOLE_IN, dtype=torch.float32) if kind == "4bit" else filled_int8(WHOLE_IN)
    monkeypatch.setattr(linear, "MAX_HOST_ELEMENTS", max_elements)
    x, y = torch.randn(50, WHOLE_IN), torch.randn(50, OUT)
    out, gradient = y.clone(), x.clone()
    layer.add_product(x, out)
    layer.add_input_gradient(y, gradient)
    weight = layer.dequantize()
    torch.testing.assert_close(out, y + x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, x + y @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["4bit", "4bit-dq", "int8"])
def test_packed_tensors_are_taken_out_and_put_back(kind: str) -> None:
    layer = filled_int8() if kind == "int8" else filled(double_quant=kind.endswith("dq"))
    before = {name: tensor.clone() for name, tensor in layer.packed_tensors().items()}
    assert before.keys() == layer.state_dict().keys() - {"bias"}
    layer.requantize(torch.randn(OUT, IN))
    assert any(not torch.equal(t, before[n]) for n, t in layer.packed_tensors().items())
    layer.set_packed(before)
    assert all(torch.equal(t, before[n]) for n, t in layer.packed_tensors().items())


def test_meta_layers_declare_the_shapes_of_the_format() -> None:
    with torch.device("meta"):
        layer = build_linear(
            FourBitLayer(256, 512, "fp4", 32, torch.bfloat16, True), bias=None, compute_dtype=None
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "weight": (65536, 1),
        "absmax": (4096,),
        "nested_absmax": (16,),
        "nested_quant_map": (256,),
        "nested_offset": (),
    }
    assert "fp4-dq, blocksize=32" in repr(layer)
