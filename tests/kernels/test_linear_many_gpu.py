"""On Hopper: products of many tokens against float64 and against the dequantizing kernel."""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.linear_few import LinearKind, Tokens
from cupy_kernels.linear_many import SHAPES, LinearMany
from cupy_kernels.loader import compiles_for
from tests.kernels.layers_on_gpu import DEVICE, DTYPES, LARGEST_ERROR, make

pytestmark = pytest.mark.gpu

# One chunk of columns; an odd number of them; many. Rows of a part of a tile, and of many.
KINDS = (
    (LinearKind("nf4", 256, "BF16"), 131),
    (LinearKind("fp4", 1280, "F16", blocksize=128), 300),
    (LinearKind("nf4", 1536, "BF16", blocksize=4096, nested=True), 1000),
    (LinearKind("nf4", 4096, "BF16", nested=True), 9000),
    (LinearKind("int8", 256, "F16"), 131),
    (LinearKind("int8", 1536, "BF16"), 1000),
)


@pytest.fixture(autouse=True)
def _on_hopper():
    if not compiles_for("sm_90"):
        pytest.skip("the kernel is Hopper's")


def stream():
    return torch.cuda.current_stream().cuda_stream


def tokens_of(x, *outs, residual=None):
    return Tokens(
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        tuple(out.data_ptr() for out in outs),
        tuple(out.stride(0) for out in outs),
        residual=0 if residual is None else residual.data_ptr(),
        residual_stride=0 if residual is None else residual.stride(0),
    )


def activations(kind, count):
    return torch.randn(count, kind.columns + 8, device=DEVICE).to(DTYPES[kind.dtype])[:, :-8]


@pytest.mark.parametrize("count", [1, 65, 128, 200, 520])
@pytest.mark.parametrize(("kind", "rows"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_near_float64_and_the_same_every_time(shape, kind, rows, count):
    weight, dense, kept = make(kind, rows)
    launch = LinearMany(kind, [weight], count, shape=shape)
    x = activations(kind, count)
    expected = x.double() @ dense.T + kept[1].double()
    found = []
    for _ in range(3):
        out = torch.full((count + 1, rows), torch.nan, dtype=x.dtype, device=DEVICE)
        launch.queue(tokens_of(x, out), stream())
        torch.cuda.synchronize()
        assert out[count].isnan().all()
        found.append(out[:count])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    error = (found[0].double() - expected).norm() / expected.norm()
    assert error < LARGEST_ERROR[kind.dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights_are_those_of_dequantizing(quant_type, dtype, shape):
    """One-hot tokens bring each weight as it was multiplied."""
    from cupy_kernels.dequantize_4bit import NestedAbsmax, dequantize_4bit

    kind = LinearKind(quant_type, 512, dtype, nested=True)
    weight, _, kept = make(kind, 200)
    kept[1].zero_()  # the bias
    expected = torch.empty(200, 512, dtype=DTYPES[dtype], device=DEVICE)
    nested = NestedAbsmax(
        weight.absmax_codes, weight.nested_absmax, weight.nested_quant_map, weight.nested_offset
    )
    dequantize_4bit(
        weight.weight,
        expected.numel(),
        nested,
        quant_type,
        kind.blocksize,
        dtype,
        expected.data_ptr(),
        stream(),
    )
    x = torch.eye(512, dtype=DTYPES[dtype], device=DEVICE)
    out = torch.empty(512, 200, dtype=DTYPES[dtype], device=DEVICE)
    LinearMany(kind, [weight], 512, shape=shape).queue(tokens_of(x, out), stream())
    assert torch.equal(out.T, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_codes_are_exact(shape):
    """One-hot tokens bring each code times its row's scale, rounded once."""
    kind = LinearKind("int8", 512, "BF16")
    weight, dense, kept = make(kind, 200)
    kept[1].zero_()
    x = torch.eye(512, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(512, 200, dtype=torch.bfloat16, device=DEVICE)
    LinearMany(kind, [weight], 512, shape=shape).queue(tokens_of(x, out), stream())
    # SCB / 127 is rounded before, so that a value in the middle of two may go the other way.
    step = torch.finfo(torch.bfloat16).eps
    assert ((out.T.double() - dense).abs() <= dense.abs() * step * 0.5001).all()


@pytest.mark.parametrize("kind", [KINDS[2][0], KINDS[5][0]])
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_of_one_launch_are_those_of_three(shape, kind):
    rows = (300, 128, 130)
    made = [make(kind, count) for count in rows]
    weights = [weight for weight, _, _ in made]
    x = activations(kind, 333)
    together = torch.full((333, sum(rows) + 2), torch.nan, dtype=x.dtype, device=DEVICE)
    outs = torch.split(together[:, :-2], rows, dim=1)
    LinearMany(kind, weights, 333, shape=shape).queue(tokens_of(x, *outs), stream())
    assert together[:, -2:].isnan().all()
    for weight, out in zip(weights, outs, strict=True):
        alone = torch.empty(333, weight.rows, dtype=x.dtype, device=DEVICE)
        LinearMany(kind, [weight], 333, shape=shape).queue(tokens_of(x, alone), stream())
        assert torch.equal(out, alone)


@pytest.mark.parametrize("kind", [KINDS[2][0], KINDS[5][0]])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_is_added_before_rounding(shape, kind):
    weight, dense, kept = make(kind, 1000)
    x = activations(kind, 150)
    residual = torch.randn(150, 1000, dtype=x.dtype, device=DEVICE) * 10
    expected = x.double() @ dense.T + kept[1].double() + residual.double()
    LinearMany(kind, [weight], 150, shape=shape).queue(
        tokens_of(x, residual, residual=residual), stream()
    )
    error = (residual.double() - expected).norm() / expected.norm()
    assert error < LARGEST_ERROR["BF16"]


def test_a_launch_takes_other_layers_and_other_tokens_in_a_graph():
    kind = LinearKind("nf4", 2048, "BF16", nested=True)
    (first, *_), (second, dense, kept) = made = [make(kind, 640) for _ in range(2)]
    launch = LinearMany(kind, [first], 512)
    out = torch.empty(700, 640, dtype=torch.bfloat16, device=DEVICE)
    x = activations(kind, 512)
    launch.queue(tokens_of(x, out), stream())
    launch.set_weights([second])
    x = activations(kind, 700)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launch.queue(tokens_of(x, out), stream())
    x.normal_()
    graph.replay()
    expected = x.double() @ dense.T + kept[1].double()
    assert (out.double() - expected).norm() / expected.norm() < LARGEST_ERROR["BF16"]
    assert made
