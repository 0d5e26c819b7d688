"""The operators: values, gradients, shapes without data, and what PyTorch expects of operators."""

from __future__ import annotations

import pytest
import torch

from qtool.runtime import products
from tests.runtime.packed_layers import (
    QUANTS,
    exact_product,
    exact_weight,
    make_layer,
    relative_error,
)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_products_on_the_cpu_are_those_of_the_weight(quant, num_tokens):
    layer = make_layer(quant, 96, 192, dtype=torch.float32, bias=True)
    x = torch.randn(2, num_tokens, 192)
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (2, num_tokens, 96)
    assert relative_error(found, exact_product(layer, x)) < 1e-5


@pytest.mark.parametrize("quant", QUANTS)
def test_gradients_of_the_input_and_the_bias_are_those_of_the_dense_layer(quant):
    layer = make_layer(quant, 96, 192, dtype=torch.float32, bias=True)
    x = torch.randn(5, 192, requires_grad=True)
    layer.bias.requires_grad_(True)
    upstream = torch.randn(5, 96)
    layer(x).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ exact_weight(layer)) < 1e-5
    assert torch.allclose(layer.bias.grad, upstream.sum(0), atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3])
def test_gradients_are_the_same_in_pieces(monkeypatch, pieces):
    layer = make_layer("nf4-dq", 96, 192, dtype=torch.float32)
    monkeypatch.setattr(products, "MAX_DEQUANTIZED_ELEMENTS", 96 * 192 // pieces)
    x = torch.randn(5, 192, requires_grad=True)
    upstream = torch.randn(5, 96)
    layer(x).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ exact_weight(layer)) < 1e-5


def test_the_operators_keep_what_pytorch_asks_of_operators():
    four_bit, nested, int8 = (
        make_layer(q, 64, 128, dtype=torch.float32) for q in ("nf4", "fp4-dq", "int8")
    )
    x = torch.randn(3, 128, requires_grad=True)
    absent = (None,) * 4
    cases = [
        (
            torch.ops.qtool.linear_4bit.default,
            (x, four_bit.weight, four_bit.absmax, *absent, None, "nf4", 64, 64, "float32"),
        ),
        (
            torch.ops.qtool.linear_4bit.default,
            (x, nested.weight, None, *nested.nested.tensors, None, "fp4", 64, 64, "float32"),
        ),
        (torch.ops.qtool.linear_int8.default, (x, int8.weight, int8.SCB, None)),
    ]
    for operator, arguments in cases:
        results = torch.library.opcheck(
            operator,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        assert set(results.values()) == {"SUCCESS"}


def test_on_the_meta_device_shapes_are_known():
    with torch.device("meta"):
        layer = make_layer_on_meta()
        assert layer(torch.empty(2, 7, 128, dtype=torch.bfloat16)).shape == (2, 7, 64)


def make_layer_on_meta():
    from qtool.runtime.linear import FourBitLayer, Linear4bit

    return Linear4bit(FourBitLayer(64, 128, "nf4", 64, torch.bfloat16, True))
