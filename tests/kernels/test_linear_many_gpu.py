"""On Hopper: products of many tokens against float64 and against the dequantizing kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cupy_kernels.linear_few import LinearKind, Tokens
from cupy_kernels.linear_many import CHUNK, SHAPES, LinearMany, can_be_handed_over
from cupy_kernels.loader import compiles_for
from tests.kernels.layers_on_gpu import DEVICE, DTYPES, LARGEST_ERROR, make

pytestmark = pytest.mark.gpu

# One chunk of columns; an odd number of them; many. Rows of a part of a tile, and of many; 9000 are
# several bands.
KINDS = (
    (LinearKind("nf4", 256, "BF16"), 131),
    (LinearKind("fp4", 1280, "F16", blocksize=128), 300),
    (LinearKind("nf4", 1536, "BF16", blocksize=4096, nested=True), 1000),
    (LinearKind("nf4", 4096, "BF16", nested=True), 9000),
    (LinearKind("int8", 256, "F16"), 131),
    (LinearKind("int8", 1536, "BF16"), 1000),
)


# Tokens of a tile, and how many of the last tiles are shared: none, all, or those behind the first.
CUTS = [
    (shape, shared)
    for shape in SHAPES
    for shared in (("none",) if shape.split == 1 else ("all", "some"))
]
ALIKE = [cut for cut in CUTS if cut[1] != "some"]


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


def launch_of(cut, kind, weights, count):
    shape, shared = cut
    num_tiles = sum(-(-weight.rows // 128) for weight in weights) * -(-count // shape.tokens)
    if kind.columns < shape.split * CHUNK:
        shared = "none"
    num_shared = {"none": 0, "all": num_tiles, "some": num_tiles - 1 - num_tiles // 3}[shared]
    return LinearMany(kind, weights, count, shape=shape, num_shared=num_shared)


def activations(kind, count):
    return torch.randn(count, kind.columns + 8, device=DEVICE).to(DTYPES[kind.dtype])[:, :-8]


@pytest.mark.parametrize("count", [1, 65, 128, 200, 520])
@pytest.mark.parametrize(("kind", "rows"), KINDS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
def test_products_are_near_float64_and_the_same_every_time(cut, kind, rows, count):
    weight, dense, kept = make(kind, rows)
    launch = launch_of(cut, kind, [weight], count)
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


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights_are_those_of_dequantizing(quant_type, dtype, cut):
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
    launch_of(cut, kind, [weight], 512).queue(tokens_of(x, out), stream())
    assert torch.equal(out.T, expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_weights_of_any_size_are_those_of_dequantizing(blocksize, quant_type, dtype):
    """Each code's value is looked up by its bytes, so that every bit of them has to count."""
    from cupy_kernels.dequantize_4bit import dequantize_4bit

    kind = LinearKind(quant_type, 1024, dtype, blocksize=blocksize)
    weight, _, kept = make(kind, 200)
    _, bias, absmax = kept
    bias.zero_()
    largest = 60.0 if dtype == "BF16" else 14.0
    absmax.copy_(torch.exp2(torch.empty_like(absmax).uniform_(-largest, largest)))
    expected = torch.empty(200, 1024, dtype=DTYPES[dtype], device=DEVICE)
    arguments = quant_type, kind.blocksize, dtype, expected.data_ptr(), stream()
    dequantize_4bit(weight.weight, expected.numel(), weight.absmax, *arguments)
    x = torch.eye(1024, dtype=DTYPES[dtype], device=DEVICE)
    out = torch.empty(1024, 200, dtype=DTYPES[dtype], device=DEVICE)
    LinearMany(kind, [weight], 1024).queue(tokens_of(x, out), stream())
    assert torch.equal(out.T, expected)


@pytest.mark.parametrize("blocksize", [64, 128])
def test_nested_absmax_may_begin_anywhere(blocksize):
    kind = LinearKind("nf4", 1280, "BF16", blocksize=blocksize, nested=True)
    weight, _, kept = make(kind, 130)
    codes = kept[2]
    elsewhere = torch.cat((codes[:1], codes))[1:]
    x = activations(kind, 100)
    found = []
    for address in (codes.data_ptr(), elsewhere.data_ptr()):
        out = torch.empty(100, 130, dtype=x.dtype, device=DEVICE)
        launch = LinearMany(kind, [replace(weight, absmax_codes=address)], 100)
        launch.queue(tokens_of(x, out), stream())
        found.append(out)
    assert elsewhere.data_ptr() % 4 == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
def test_int8_codes_are_exact(cut):
    """One-hot tokens bring each code times its row's scale, rounded once."""
    kind = LinearKind("int8", 512, "BF16")
    weight, dense, kept = make(kind, 200)
    kept[1].zero_()
    x = torch.eye(512, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(512, 200, dtype=torch.bfloat16, device=DEVICE)
    launch_of(cut, kind, [weight], 512).queue(tokens_of(x, out), stream())
    # SCB / 127 is rounded before, so that a value in the middle of two may go the other way.
    step = torch.finfo(torch.bfloat16).eps
    assert ((out.T.double() - dense).abs() <= dense.abs() * step * 0.5001).all()


@pytest.mark.parametrize("kind", [KINDS[2][0], KINDS[5][0]])
@pytest.mark.parametrize("cut", ALIKE, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
@pytest.mark.parametrize("rows", [(300, 128, 130), (3000, 1000, 4100)])
def test_layers_of_one_launch_are_those_of_three(rows, cut, kind):
    """Of one band, and of bands that begin anywhere in a layer."""
    made = [make(kind, count) for count in rows]
    weights = [weight for weight, _, _ in made]
    x = activations(kind, 333)
    together = torch.full((333, sum(rows) + 2), torch.nan, dtype=x.dtype, device=DEVICE)
    outs = torch.split(together[:, :-2], rows, dim=1)
    launch_of(cut, kind, weights, 333).queue(tokens_of(x, *outs), stream())
    assert together[:, -2:].isnan().all()
    for weight, out in zip(weights, outs, strict=True):
        alone = torch.empty(333, weight.rows, dtype=x.dtype, device=DEVICE)
        launch_of(cut, kind, [weight], 333).queue(tokens_of(x, alone), stream())
        assert torch.equal(out, alone)


@pytest.mark.parametrize("kind", [KINDS[2][0], KINDS[5][0]])
@pytest.mark.parametrize("rows", [1000, 333])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
def test_a_residual_is_added_before_rounding(cut, kind, rows):
    weight, dense, kept = make(kind, rows)
    x = activations(kind, 150)
    residual = torch.randn(150, rows, dtype=x.dtype, device=DEVICE) * 10
    expected = x.double() @ dense.T + kept[1].double() + residual.double()
    launch_of(cut, kind, [weight], 150).queue(tokens_of(x, residual, residual=residual), stream())
    error = (residual.double() - expected).norm() / expected.norm()
    assert error < LARGEST_ERROR["BF16"]


@pytest.mark.parametrize("residual", [None, "apart", "out"])
@pytest.mark.parametrize("rows", [17_000, 5001, 5002])
@pytest.mark.parametrize("num_shared", [0, 52])
@pytest.mark.parametrize("kind", [KINDS[2][0], KINDS[5][0]])
def test_results_are_the_same_however_they_are_stored(kind, num_shared, rows, residual):
    """By the copy engine, in pairs of rows, or one by one; thread blocks have several tiles."""
    split = 1 if num_shared == 0 else 2
    (shape,) = (shape for shape in SHAPES if shape.hands_over and shape.split == split)
    count = 1600
    weight, dense, kept = make(kind, rows)
    launch = LinearMany(kind, [weight], count, shape=shape, num_shared=num_shared)
    x = activations(kind, count)
    other = torch.randn(count, rows, dtype=x.dtype, device=DEVICE)
    expected = x.double() @ dense.T + kept[1].double() + (0 if residual is None else other.double())
    found = []
    for skip, pad in ((0, 0), (8, 24), (2, 6), (1, 9)):  # values before the rows' first, and behind
        stride = -(-rows // 8) * 8 + skip + pad
        frame = torch.full((count + 1, stride), torch.nan, dtype=x.dtype, device=DEVICE)
        out = frame[:count, skip : skip + rows]
        given = {None: None, "apart": other, "out": out}[residual]
        if residual == "out":
            out.copy_(other)
        tokens = tokens_of(x, out, residual=given)
        assert can_be_handed_over((rows,), tokens) == (rows % 8 == 0 and skip % 8 == 0)
        launch.queue(tokens, stream())
        torch.cuda.synchronize()
        found.append(out.clone())
        frame[:count, skip : skip + rows] = torch.nan
        assert frame.isnan().all()
    assert all(torch.equal(found[0], again) for again in found[1:])
    error = (found[0].double() - expected).norm() / expected.norm()
    assert error < LARGEST_ERROR["BF16"]


def test_a_launch_takes_other_layers_and_other_tokens_in_a_graph():
    kind = LinearKind("nf4", 2048, "BF16", nested=True)
    (first, *_), (second, dense, kept) = made = [make(kind, 640) for _ in range(2)]
    launch = LinearMany(kind, [first], 512)
    out = torch.empty(700, 640, dtype=torch.bfloat16, device=DEVICE)
    x = activations(kind, 512)
    launch.queue(tokens_of(x, out), stream())
    expected = x.double() @ made[0][1].T + made[0][2][1].double()
    assert (out[:512].double() - expected).norm() / expected.norm() < LARGEST_ERROR["BF16"]
    launch.set_weights([second])
    x = activations(kind, 700)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launch.queue(tokens_of(x, out), stream())
    x.normal_()
    # What the launch is told later does not reach the graph.
    launch.set_weights([first])
    launch.queue(tokens_of(activations(kind, 65), torch.empty_like(out)), stream())
    out.fill_(torch.nan)
    graph.replay()
    expected = x.double() @ dense.T + kept[1].double()
    assert (out.double() - expected).norm() / expected.norm() < LARGEST_ERROR["BF16"]


@pytest.mark.parametrize("cut", ALIKE, ids=lambda cut: f"{cut[0].tokens}-{cut[1]}")
def test_layers_have_maps_of_their_own(cut):
    kind = LinearKind("nf4", 512, "BF16", nested=True)
    made = [make(kind, 130) for _ in range(3)]
    for factor, (_, _, kept) in enumerate(made, 1):
        kept[4].mul_(factor)  # the dynamic map
    x = activations(kind, 140)
    outs = [torch.empty(140, 130, dtype=x.dtype, device=DEVICE) for _ in made]
    weights = [weight for weight, _, _ in made]
    launch_of(cut, kind, weights, 140).queue(tokens_of(x, *outs), stream())
    for weight, out in zip(weights, outs, strict=True):
        alone = torch.empty_like(out)
        launch_of(cut, kind, [weight], 140).queue(tokens_of(x, alone), stream())
        assert torch.equal(out, alone)
    assert not torch.equal(outs[0], outs[1])


def test_launches_in_a_chain_wait_for_each_other():
    kind = LinearKind("nf4", 1024, "BF16", nested=True)
    weight, _, _kept = make(kind, 1024)
    found = []
    for overlap in (False, True):
        launch = LinearMany(kind, [weight], 512, overlap=overlap)
        values = [torch.empty(512, 1024, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        torch.manual_seed(0)
        values[0].normal_()
        for step in range(16):
            launch.queue(tokens_of(values[step % 2], values[1 - step % 2]), stream())
            values[1 - step % 2] /= values[1 - step % 2].std()
        for step in range(16):
            launch.queue(tokens_of(values[step % 2], values[1 - step % 2]), stream())
        torch.cuda.synchronize()
        assert values[0].isfinite().all() and values[0].std() > 1e-3
        found.append(values[0].view(torch.int16))
    assert torch.equal(*found)
