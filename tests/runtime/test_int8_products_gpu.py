"""On an NVIDIA GPU: rounded activations against the CPU's, without waiting, in graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from qtool.bench.bitsandbytes_layers import share_layer
from qtool.runtime import int8_products
from qtool.runtime.int8_products import add_product, find_outliers, round_activations, round_rows
from qtool.runtime.products import rounds_activations
from tests.runtime.packed_layers import exact_product, exact_weight, make_layer, relative_error

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
# Sums of outliers in another order, then rounded to the dtype.
ORDER = {torch.bfloat16: 1e-3, torch.float16: 1.5e-4}
SHAPES = [(65, 96, 192), (128, 264, 1408), (97, 1000, 4112), (300, 520, 28672)]


def activations(tokens, columns, dtype, outliers=()):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator)
    for number, column in enumerate(outliers):
        x[number * 7 % tokens, column] = 30.0 * (-1) ** number
    return x.to("cuda", dtype)


def layer_with(threshold, out_features, in_features, **options):
    layer = make_layer("int8", out_features, in_features, device="cuda", **options)
    layer.threshold = threshold
    return layer


def multiply(layer, x):
    """The product, in places that held NaN before."""
    poison = torch.full((1 << 22,), torch.nan, dtype=x.dtype, device="cuda")
    del poison
    with torch.no_grad():
        return layer(x)


def on_cpu(layer, x):
    twin = copy.deepcopy(layer).cpu()
    twin.threshold = layer.threshold
    with torch.no_grad():
        return twin(x.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(65, 64), (130, 4112), (70, 28672), (66, 60000)])
@pytest.mark.parametrize("threshold", [0.0, 3.5, 6.0])
def test_activations_are_rounded_as_on_the_cpu(dtype, tokens, columns, threshold):
    columns = columns // 16 * 16
    x = activations(tokens, columns, dtype, (0, 17, columns - 1))
    outliers = find_outliers(x, threshold)
    found = round_activations(x, outliers)
    codes, absmax, expected = round_rows(x.cpu(), threshold)
    assert torch.equal(found.absmax.cpu(), absmax)
    assert torch.equal(found.codes.cpu(), codes)
    if outliers is not None:
        count = len(expected)
        assert outliers.columns[: count + 1].tolist() == [count, *expected.tolist()]
        assert torch.equal(found.values[:, :count].cpu(), x.cpu()[:, expected])
        assert not found.values[:, count : -(-count // 16) * 16].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out_features", "columns"), SHAPES)
@pytest.mark.parametrize("num_outliers", [0, 3, 64, 65, None])
def test_products_are_those_of_the_cpu(dtype, tokens, out_features, columns, num_outliers):
    step = 1 if num_outliers is None else columns // max(num_outliers, 1)
    outliers = range(0, columns, step) if num_outliers != 0 else ()
    layer = layer_with(6.0, out_features, columns, dtype=dtype, bias=True)
    x = activations(tokens, columns, dtype, outliers)
    assert rounds_activations(x, layer.weight, 6.0)
    found, expected = multiply(layer, x).cpu(), on_cpu(layer, x)
    if num_outliers == 0:  # nothing but exact sums, and the same roundings
        assert torch.equal(found, expected)
    assert relative_error(found, expected) < ORDER[dtype]


def test_without_a_threshold_for_outliers_the_bits_are_those_of_the_cpu():
    layer = layer_with(0.0, 264, 1408)
    x = activations(100, 1408, torch.bfloat16, (3,))
    assert torch.equal(multiply(layer, x).cpu(), on_cpu(layer, x))


def test_pieces_of_tokens_and_rows(monkeypatch):
    layer = layer_with(6.0, 1000, 512, bias=True)
    x = activations(200, 512, torch.bfloat16, (3, 500))
    expected = multiply(layer, x)
    monkeypatch.setattr(int8_products, "MAX_ROUNDED_ROWS", 64)
    monkeypatch.setattr(int8_products, "MAX_SUMS", 64 * 256)
    assert torch.equal(multiply(layer, x), expected)


def test_a_token_more_than_a_piece_has():
    layer = layer_with(6.0, 64, 128)
    x = activations(int8_products.MAX_ROUNDED_ROWS + 1, 128, torch.bfloat16, (3,))
    assert relative_error(multiply(layer, x), on_cpu(layer, x)) < ORDER[torch.bfloat16]


def test_added_to_what_is_there():
    layer = layer_with(6.0, 264, 512, bias=True)
    x = activations(100, 512, torch.bfloat16, (3, 500))
    rounded = round_activations(x, find_outliers(x, 6.0))
    wide = torch.randn(100, 400, dtype=torch.bfloat16, device="cuda")
    before, out = wide.clone(), wide[:, 8:272]
    add_product(rounded, layer.weight, layer.SCB, layer.bias, out, added=True)
    expected = before[:, 8:272].double() + multiply(layer, x).double()
    assert relative_error(out, expected) < 4e-3
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 272:], before[:, 272:])


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_nan_and_infinity_stay_in_their_rows(threshold):
    layer = layer_with(threshold, 64, 128)
    x = activations(80, 128, torch.bfloat16)
    x[3, 5], x[9, 60] = torch.nan, torch.inf
    is_finite = multiply(layer, x).isfinite()
    assert not is_finite[[3, 9]].any() and int(is_finite.all(1).sum()) == 78


def test_strided_and_misaligned_activations():
    layer = layer_with(6.0, 64, 128)
    wide = activations(70, 261, torch.bfloat16, (3, 100))
    for x in (wide[:, :128], wide[:, 3:131], wide[:, ::2][:, :128]):
        assert relative_error(multiply(layer, x), on_cpu(layer, x)) < ORDER[torch.bfloat16]


def test_nothing_waits_for_the_device_and_a_graph_takes_new_outliers():
    layer = layer_with(6.0, 264, 512)
    x = activations(100, 512, torch.bfloat16, (3,))
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for outliers in ((), (1, 2, 400), range(0, 512, 5), range(512)):
            x.copy_(activations(100, 512, torch.bfloat16, outliers))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, layer(x))
            assert relative_error(y, on_cpu(layer, x)) < ORDER[torch.bfloat16]


def test_on_another_stream():
    layer = layer_with(6.0, 264, 512)
    x = activations(100, 512, torch.bfloat16, (3,))
    expected = multiply(layer, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work on the default stream would be done long before
        found = multiply(layer, x * 1)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_bitsandbytes_and_as_exact(dtype):
    pytest.importorskip("bitsandbytes")
    layer = layer_with(6.0, 1024, 2048, dtype=dtype)
    rival = share_layer(layer, int8_threshold=6.0)
    x = activations(256, 2048, dtype, (5, 200, 2000))
    with torch.no_grad():
        found, theirs = layer(x), rival(x)
    assert relative_error(found, theirs) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
    exact = exact_product(layer, x)
    assert relative_error(found, exact) <= relative_error(theirs, exact) * 1.001


def test_gradients_are_those_of_exact_activations():
    layer = layer_with(6.0, 96, 192)
    x = activations(70, 192, torch.bfloat16, (3,)).requires_grad_()
    upstream = torch.randn(70, 96, dtype=torch.bfloat16, device="cuda")
    layer(x).backward(upstream)
    assert relative_error(x.grad, upstream.cpu().double() @ exact_weight(layer)) < 1e-2


def test_shapes_that_fit_no_kernel_are_not_rounded():
    for out_features, columns in ((50, 192), (64, 200)):
        layer = layer_with(6.0, out_features, columns)
        x = activations(70, columns, torch.bfloat16)
        assert not rounds_activations(x, layer.weight, 6.0)
        assert relative_error(multiply(layer, x), exact_product(layer, x)) < 5e-3
