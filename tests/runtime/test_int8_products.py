"""Products of activations rounded to INT8, on the CPU, against float64 and bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from qtool.bench.bitsandbytes_layers import share_layer
from qtool.formats.reciprocal import reciprocal
from qtool.runtime import int8_products
from qtool.runtime.int8_products import multiply_rounded_host, round_rows
from qtool.runtime.products import MAX_PACKED_TOKENS, linear_int8, rounds_activations
from tests.runtime.packed_layers import exact_product, exact_weight, make_layer, relative_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of the result's rounding; that of activations comes on top.
ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}


def activations(tokens, columns, dtype, outliers=()):
    """Normal, one of 30 in some row of each of the columns `outliers`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator)
    for number, column in enumerate(outliers):
        x[number % tokens, column] = 30.0 * (-1) ** number
    return x.to(dtype)


def layer_with(threshold, out_features, in_features, **options):
    layer = make_layer("int8", out_features, in_features, **options)
    layer.threshold = threshold
    return layer


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("outliers", [(), (0, 5, 171), range(172)])
def test_products_are_those_of_the_rounded_activations(dtype, threshold, outliers):
    layer = layer_with(threshold, 50, 172, dtype=dtype, bias=True)
    x = activations(70, 172, dtype, outliers)
    is_outlier = x.double().abs() >= (threshold or torch.inf)
    apart = is_outlier.any(0)
    step = x.double().masked_fill(is_outlier, 0).abs().amax(1, keepdim=True) / 127
    rounded = torch.where(apart, x.double(), (x.double() / step).round() * step)
    with torch.no_grad():
        found = layer(x)
    # A code that lies between two may be the other one.
    assert relative_error(found, exact_product(layer, rounded)) < ROUNDING[dtype] + 2e-5
    assert found.dtype == dtype
    assert int(apart.sum()) == (len(outliers) if threshold else 0)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_outliers_make_it_as_exact_as_the_rest_of_the_row(threshold):
    layer = layer_with(threshold, 64, 512, dtype=torch.float32)
    x = activations(80, 512, torch.float32, (7, 100))
    error = relative_error(layer(x), exact_product(layer, x))
    assert 1e-3 < error < (0.02 if threshold else 0.2)
    if threshold == 0:
        assert error > 0.01


def test_a_row_of_zeros_is_the_bias():
    layer = layer_with(6.0, 32, 64, dtype=torch.float32, bias=True)
    x = torch.zeros(65, 64)
    assert torch.equal(layer(x), layer.bias.expand(65, 32))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nan_and_infinity_stay_in_their_rows(threshold):
    layer = layer_with(threshold, 32, 64, dtype=torch.float32)
    x = activations(66, 64, torch.float32)
    x[3, 5], x[9, 60] = torch.nan, torch.inf
    finite = layer(x).isfinite()
    assert not finite[[3, 9]].any() and finite[[i for i in range(66) if i not in (3, 9)]].all()


def test_sums_are_exact_where_float32_would_round(monkeypatch):
    x_codes = torch.full((3, 5000), 127, dtype=torch.int8)
    codes = torch.full((2, 5000), -128, dtype=torch.int8)
    codes[0, 0] = -127
    expected = x_codes.int() @ codes.int().t()
    assert int(expected[0, 0]) != int(expected[0, 0].float())  # of 27 bits
    assert torch.equal(int8_products._exact_sums(x_codes, codes), expected)
    monkeypatch.setattr(int8_products, "EXACT_COLUMNS", 5000)
    assert not torch.equal(int8_products._exact_sums(x_codes, codes), expected)


def test_pieces_of_the_weight_are_joined(monkeypatch):
    layer = layer_with(6.0, 50, 192, dtype=torch.float32, bias=True)
    x = activations(70, 192, torch.float32, (4,))
    expected = layer(x)
    monkeypatch.setattr(int8_products, "_HOST_SUMS", 70 * 16)
    assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_no_piece_has_so_few_tokens_that_torch_refuses_it():
    most = int8_products.MAX_ROUNDED_ROWS
    for count in (65, most, most + 1, 2 * most + 3, 50 * most + 1):
        pieces = int8_products.token_pieces(count)
        assert [last for _, last in pieces[:-1]] == [first for first, _ in pieces[1:]]
        assert pieces[0][0] == 0 and pieces[-1][1] == count
        assert all(64 < last - first <= most for first, last in pieces)


# -- when -----------------------------------------------------------------------------------------


def test_up_to_64_tokens_and_without_a_threshold_nothing_is_rounded():
    layer = layer_with(0.0, 32, 64, dtype=torch.float32)
    few, many = (activations(n, 64, torch.float32) for n in (MAX_PACKED_TOKENS, 65))
    codes = layer.weight
    assert not rounds_activations(few, codes, 0.0) and not rounds_activations(many, codes, None)
    assert rounds_activations(many, codes, 0.0)
    assert relative_error(layer(few), exact_product(layer, few)) < 1e-5
    assert relative_error(layer(many), exact_product(layer, many)) > 1e-3
    layer.threshold = None
    assert relative_error(layer(many), exact_product(layer, many)) < 1e-5


def test_all_tokens_of_a_batch_count():
    layer = layer_with(6.0, 32, 64, dtype=torch.float32)
    x = activations(80, 64, torch.float32, (3,)).view(2, 40, 64)
    found = layer(x)
    assert found.shape == (2, 40, 32)
    assert torch.equal(found.view(80, 32), layer(x.view(80, 64)))


# -- as bitsandbytes has it -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_codes_are_those_of_bitsandbytes(dtype, threshold):
    pytest.importorskip("bitsandbytes")
    x = activations(100, 1408, dtype, (0, 77, 1407))
    codes, absmax, outliers = round_rows(x, threshold)
    quantize = torch.ops.bitsandbytes.int8_vectorwise_quant
    expected, their_absmax, their_outliers = quantize(x.half(), threshold)
    assert torch.equal(absmax, their_absmax)
    if threshold:
        assert torch.equal(outliers, their_outliers) and len(outliers) >= 3
    # Its CUDA code, which ours follows, has the hardware's reciprocal; its CPU code rounds it.
    of_cpu = torch.from_numpy(reciprocal(absmax.numpy())) == 1 / absmax
    assert of_cpu.sum() > 70 and torch.equal(codes[of_cpu], expected[of_cpu])
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_products_are_those_of_bitsandbytes_and_as_exact(dtype, threshold):
    pytest.importorskip("bitsandbytes")
    layer = layer_with(threshold, 96, 512, dtype=dtype, bias=True)
    rival = share_layer(layer, int8_threshold=threshold)
    x = activations(80, 512, dtype, (5, 200))
    with torch.no_grad():
        found, theirs = layer(x), rival(x)
    # It rounds the weight's columns, and the sum before outliers are added; 1/127^2 has a typo.
    assert relative_error(found, theirs) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
    exact = exact_product(layer, x)
    assert relative_error(found, exact) <= relative_error(theirs, exact) * 1.001


# -- in PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3])
def test_gradients_are_those_of_exact_activations(monkeypatch, pieces):
    monkeypatch.setattr("qtool.formats.pieces.MAX_DEQUANTIZED_ELEMENTS", 96 * 192 // pieces)
    layer = layer_with(6.0, 96, 192, dtype=torch.float32, bias=True)
    x = activations(70, 192, torch.float32, (3,)).view(2, 35, 192).requires_grad_()
    layer.bias.requires_grad_(True)
    upstream = torch.randn(2, 35, 96)
    layer(x).backward(upstream)
    assert relative_error(x.grad, upstream.double() @ exact_weight(layer)) < 1e-5
    assert torch.allclose(layer.bias.grad, upstream.sum((0, 1)), atol=1e-4)


def test_the_operator_keeps_what_pytorch_asks_of_operators():
    layer = make_layer("int8", 64, 128, dtype=torch.float32)
    x = torch.randn(70, 128, requires_grad=True)
    results = torch.library.opcheck(
        torch.ops.qtool.linear_int8.default,
        (x, layer.weight, layer.SCB, None, 6.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}


def test_the_function_and_the_layer_are_one():
    layer = layer_with(6.0, 32, 64, dtype=torch.bfloat16, bias=True)
    x = activations(65, 64, torch.bfloat16, (1,))
    expected = multiply_rounded_host(x, layer.weight, layer.SCB, layer.bias, 6.0)
    found = linear_int8(x, layer.weight, layer.SCB, layer.bias, threshold=6.0)
    assert torch.equal(found, expected) and torch.equal(layer(x), expected)
