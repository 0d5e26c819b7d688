"""The operators: values, gradients, shapes without data, and what PyTorch expects of operators."""

from __future__ import annotations

import re

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
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", 96 * 192 // pieces)
    x = torch.randn(5, 192, requires_grad=True)
    upstream = torch.randn(5, 96)
    layer(x).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ exact_weight(layer)) < 1e-5


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 63), (3, 63), (3, 64)])
def test_gradients_where_the_last_byte_may_hold_one_value(out_features, in_features):
    layer = make_layer("nf4", out_features, in_features, dtype=torch.float32)
    weight = layer.dequantize()
    x = torch.randn(5, in_features, requires_grad=True)
    found = layer(x)
    assert relative_error(found.detach(), x.detach() @ weight.T) < 1e-5
    upstream = torch.randn(5, out_features)
    found.backward(upstream)
    assert relative_error(x.grad, upstream @ weight) < 1e-5


# -- activations of another width than the weight --------------------------------------------------


def says(in_features, found):
    return pytest.raises(RuntimeError, match=re.escape(f"[..., {in_features}], found {found}"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("quant", QUANTS)
def test_activations_of_another_width_are_refused(quant, columns, num_tokens, device):
    layer = make_layer(quant, 32, 128).to(device)
    with says(128, [2, num_tokens, columns]):
        layer(torch.ones(2, num_tokens, columns, dtype=torch.bfloat16, device=device))


def test_many_activations_that_would_be_rounded_are_refused_too():
    layer = make_layer("int8", 32, 128)
    layer.threshold = 6.0
    with says(128, [200, 64]):
        layer(torch.ones(200, 64, dtype=torch.bfloat16))


def test_a_gpu_refuses_them_before_it_reads_anything():
    four_bit, int8 = (make_layer(quant, 32, 128).to("meta") for quant in ("nf4", "int8"))
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    statistics = (four_bit.absmax, None, None, None, None)
    with says(128, [3, 64]):
        products._linear_4bit_cuda(x, four_bit.weight, *statistics, None, "nf4", 64, 32, "bfloat16")
    with says(128, [3, 64]):
        products._linear_int8_cuda(x, int8.weight, int8.SCB, None, 6.0)


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_a_compiled_layer_refuses_them_and_takes_others_of_any_length(quant):
    layer = make_layer(quant, 32, 128, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (3, 5):
        x = torch.randn(num_tokens, 128)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
    with pytest.raises(RuntimeError, match=r"expected shape \[\.\.\., 128\]"):
        compiled(torch.randn(3, 64))


@pytest.mark.parametrize("labelled", [torch.bfloat16, torch.float32])
def test_packed_bytes_are_counted_whatever_dtype_they_are_labelled_with(labelled):
    layer = make_layer("nf4", 32, 128)
    x = torch.randn(3, 128).bfloat16()
    expected = layer(x)
    layer.weight.data = layer.weight.data.reshape(-1).view(labelled)
    assert torch.equal(layer(x), expected)
    with says(128, [3, 64]):
        layer(x[:, :64])


# -- what PyTorch expects --------------------------------------------------------------------------


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
