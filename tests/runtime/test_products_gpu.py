"""On an NVIDIA GPU: products against float64 and bitsandbytes, in graphs, with gradients."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.runtime.packed_layers import (
    QUANTS,
    exact_product,
    exact_weight,
    make_layer,
    relative_error,
)

pytestmark = pytest.mark.gpu

# Rounding the result to the dtype, and for 4 bit the code table too.
LARGEST_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
FEW_TOKENS = 64  # of more tokens the whole weight is rounded, and the error half as large again


def multiply(layer, x):
    """The product, in a place that held NaN before."""
    poison = torch.full((1 << 16,), torch.nan, dtype=x.dtype, device="cuda")
    del poison
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 9, 16, 33, 64, 70])
@pytest.mark.parametrize("quant", QUANTS)
def test_products_are_near_float64(quant, num_tokens, dtype):
    for out_features, in_features in ((96, 64), (1000, 512), (131, 1408), (512, 4096)):
        layer = make_layer(quant, out_features, in_features, dtype=dtype, bias=True, device="cuda")
        x = torch.randn(num_tokens, in_features, dtype=dtype, device="cuda")
        error = relative_error(multiply(layer, x), exact_product(layer, x))
        largest = LARGEST_ERROR[dtype] * (1 if num_tokens <= FEW_TOKENS else 1.5)
        assert error < largest, (out_features, in_features)


@pytest.mark.parametrize("num_tokens", [1, 8, 13, 64])
@pytest.mark.parametrize("blocksize", [32, 128, 512, 4096])
@pytest.mark.parametrize("quant", ["nf4", "fp4-dq"])
def test_any_block_size(quant, blocksize, num_tokens):
    for out_features, in_features in ((256, 1024), (130, 320)):
        layer = make_layer(quant, out_features, in_features, blocksize=blocksize, device="cuda")
        x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16, device="cuda")
        error = relative_error(multiply(layer, x), exact_product(layer, x))
        assert error < LARGEST_ERROR[torch.bfloat16]


@pytest.mark.parametrize("quant", QUANTS)
def test_columns_in_several_slices(quant):
    """More activations than shared memory holds at once."""
    for num_tokens, in_features in ((1, 28672), (8, 14336), (4, 20480), (6, 28672), (40, 14336)):
        layer = make_layer(quant, 200, in_features, device="cuda")
        x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16, device="cuda")
        error = relative_error(multiply(layer, x), exact_product(layer, x))
        assert error < LARGEST_ERROR[torch.bfloat16], (num_tokens, in_features)


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_widths_that_fit_no_kernel(quant):
    layer = make_layer(quant, 50, 172, device="cuda")
    x = torch.randn(3, 172, dtype=torch.bfloat16, device="cuda")
    error = relative_error(multiply(layer, x), exact_product(layer, x))
    assert error < 5e-3  # the weight is rounded to bfloat16 too


@pytest.mark.parametrize("quant", QUANTS)
def test_strided_and_misaligned_activations(quant):
    layer = make_layer(quant, 64, 128, device="cuda")
    wide = torch.randn(4, 261, dtype=torch.bfloat16, device="cuda")
    for x in (wide[:, :128], wide[:, 3:131], wide[:, ::2][:, :128], wide[1:1, :128]):
        found, expected = multiply(layer, x), exact_product(layer, x)
        assert found.shape == expected.shape
        assert x.numel() == 0 or relative_error(found, expected) < LARGEST_ERROR[torch.bfloat16]


@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_errors_are_no_larger_than_those_of_bitsandbytes(num_tokens):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") * 0.02
    x = torch.randn(num_tokens, 4096, dtype=torch.bfloat16, device="cuda")
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    layer = make_layer("nf4", 4096, 4096, device="cuda")
    layer.weight.data = packed
    layer.absmax.copy_(state.absmax)
    import bitsandbytes

    theirs = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    expected = exact_product(layer, x)
    assert relative_error(multiply(layer, x), expected) <= relative_error(theirs, expected)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("num_tokens", [1, 8, 30, 70])
def test_in_a_cuda_graph_with_new_activations(quant, num_tokens):
    layer = make_layer(quant, 256, 512, device="cuda")
    x = torch.randn(num_tokens, 512, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("quant", QUANTS)
def test_on_another_stream(quant):
    layer = make_layer(quant, 256, 512, device="cuda")
    x = torch.randn(1, 512, dtype=torch.bfloat16, device="cuda")
    expected = multiply(layer, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work on the default stream would be done long before
        y = x * 1
        found = multiply(layer, y)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_tokens", [8, 24, 64])
@pytest.mark.parametrize("quant", QUANTS)
def test_the_same_input_gives_the_same_bits(quant, num_tokens):
    layer = make_layer(quant, 1024, 2048, device="cuda")
    x = torch.randn(num_tokens, 2048, dtype=torch.bfloat16, device="cuda")
    first = multiply(layer, x)
    assert all(torch.equal(multiply(layer, x), first) for _ in range(20))


def test_streams_and_graphs_beside_each_other():
    """Thread blocks that meet count in places that nobody else counts in."""
    layers = [make_layer("nf4-dq", 512, 14336, device="cuda", seed=seed) for seed in range(3)]
    x = torch.randn(32, 14336, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected = [layer(x) for layer in layers]
        streams = [torch.cuda.Stream() for _ in layers]
        graphs = [torch.cuda.CUDAGraph() for _ in layers]
        made = []
        for layer, graph in zip(layers, graphs, strict=True):
            with torch.cuda.graph(graph):
                made.append([layer(x) for _ in range(8)])
        for _ in range(20):
            for stream, graph in zip(streams, graphs, strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    graph.replay()
            own = [[layer(x) for _ in range(8)] for layer in layers]
            torch.cuda.synchronize()
            for results, wanted in zip((*made, *own), expected * 2, strict=True):
                assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.parametrize("quant", QUANTS)
def test_gradients_of_the_input(quant):
    layer = make_layer(quant, 96, 192, device="cuda")
    x = torch.randn(5, 192, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    upstream = torch.randn(5, 96, dtype=torch.bfloat16, device="cuda")
    layer(x).backward(upstream)
    expected = upstream.cpu().double() @ exact_weight(layer)
    assert relative_error(x.grad, expected) < 1e-2


@pytest.mark.parametrize("num_tokens", [1, 8, 40, 100, 300])
@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_activations_that_are_not_aligned(quant, num_tokens):
    layer = make_layer(quant, 4096, 1024, device="cuda")
    flat = torch.randn(num_tokens * 1024 + 8, dtype=torch.bfloat16, device="cuda")
    x = flat[1 : 1 + num_tokens * 1024].view(num_tokens, 1024)
    assert x.is_contiguous() and x.data_ptr() % 16
    error = relative_error(multiply(layer, x), exact_product(layer, x))
    assert error < LARGEST_ERROR[torch.bfloat16] * 1.5


@pytest.mark.parametrize("num_tokens", [65, 128, 512, 1500])
@pytest.mark.parametrize("quant", QUANTS)
def test_products_of_many_tokens(quant, num_tokens):
    for out_features, in_features in ((1024, 1024), (3000, 512), (4096, 1280)):
        layer = make_layer(quant, out_features, in_features, bias=True, device="cuda")
        x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16, device="cuda")
        error = relative_error(multiply(layer, x), exact_product(layer, x))
        assert error < LARGEST_ERROR[torch.bfloat16] * 1.5


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_threads_that_nobody_gave_a_context(quant):
    """As PyTorch's for backward passes, whose first call that touches the device may be ours."""
    layer = make_layer(quant, 256, 512, device="cuda")
    num_tokens = (1, 70)  # a product of few and, after dequantizing, one of many
    inputs = [torch.randn(n, 512, dtype=torch.bfloat16, device="cuda") for n in num_tokens]
    expected = [multiply(layer, x) for x in inputs]
    cached = [multiply(layer, x) for x in inputs]  # memory that the thread finds without asking
    del cached
    context = ctypes.c_void_p(1)

    def multiply_without_context():
        ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
        with torch.no_grad():
            return [layer(x) for x in inputs]

    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(multiply_without_context).result()
    assert context.value is None
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_under_torch_compile():
    layer = make_layer("nf4-dq", 256, 512, device="cuda")
    x = torch.randn(1, 512, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        compiled = torch.compile(lambda x: layer(torch.relu(x)) + 1, fullgraph=True)
        expected = layer(torch.relu(x)) + 1
        assert relative_error(compiled(x), expected) < 5e-3
