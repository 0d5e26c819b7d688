"""On an NVIDIA GPU: each shape of thread blocks against float64, whatever it shares tiles with."""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.linear_few import LinearKind, Tokens, shared_memory
from cupy_kernels.linear_some import (
    COUNTER_BYTES,
    GROUP_TUNINGS,
    SMALL_TUNINGS,
    TOKEN_CLASSES,
    TUNINGS,
    LinearSome,
    plan_with,
)
from cupy_kernels.loader import compiles_for
from qtool.runtime.packed_products import PackedProduct
from tests.kernels.layers_on_gpu import DEVICE, DTYPES, LARGEST_ERROR, make

pytestmark = pytest.mark.gpu

# Tiles that one thread block has, that two cut, that many or clusters share; some are not full.
# 43 and 5 chunks: column warps do not share them evenly.
KINDS = (
    (LinearKind("nf4", 4096, "BF16", nested=True), 40_000),
    (LinearKind("nf4", 14336, "BF16", nested=True), 1000),
    (LinearKind("nf4", 4096, "BF16", nested=True), 4097),
    (LinearKind("nf4", 11008, "BF16", nested=True), 131),
    (LinearKind("nf4", 1280, "BF16", nested=True), 131),
    (LinearKind("fp4", 2240, "F16", blocksize=128), 3000),
    (LinearKind("fp4", 1408, "F16", blocksize=128), 301),
    (LinearKind("nf4", 64, "BF16", blocksize=64), 131),
)
EVERY_TUNING = [
    (tokens, tuning)
    for tokens in TOKEN_CLASSES
    for tuning in (*GROUP_TUNINGS[tokens], *TUNINGS[tokens], *SMALL_TUNINGS)
]


@pytest.mark.parametrize(("kind", "rows"), KINDS)
@pytest.mark.parametrize(("tokens", "tuning"), EVERY_TUNING)
def test_products_are_near_float64(tokens, tuning, kind, rows):
    """Those of GPUs with little shared memory, too."""
    if tuning.x_stages and not compiles_for("sm_90"):
        pytest.skip("warpgroups are Hopper's")
    plan = plan_with(tuning, kind, rows, tokens, shared_memory(torch.cuda.current_device()))
    if plan is None:
        assert tuning.split > 1
        pytest.skip("tiles or columns are not made for such clusters")
    weight, dense, kept = make(kind, rows)
    launch = LinearSome(kind, weight, max_tokens=tokens, plan=plan)
    counters = torch.zeros(COUNTER_BYTES, dtype=torch.uint8, device=DEVICE)
    sums = torch.full((launch.sum_bytes,), 255, dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.current_stream().cuda_stream
    for count in (tokens, tokens // 2 + 1, 1):
        x = torch.randn(count, kind.columns + 8, device=DEVICE).to(DTYPES[kind.dtype])
        expected = x[:, :-8].double() @ dense.T + kept[1].double()
        found = []
        for _ in range(3):
            out = torch.full((count + 1, rows), torch.nan, dtype=x.dtype, device=DEVICE)
            place = Tokens(count, x.data_ptr(), x.stride(0), (out.data_ptr(),), (rows,))
            launch.queue(place, stream, counters=counters.data_ptr(), sums=sums.data_ptr())
            torch.cuda.synchronize()
            assert out[count].isnan().all() and not counters.any()
            found.append(out[:count])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        error = (found[0].double() - expected).norm() / expected.norm()
        assert error < LARGEST_ERROR[kind.dtype], count


@pytest.mark.parametrize("num_tokens", [2, 8, 16, 64])
def test_products_that_begin_as_others_end_have_the_same_bits(num_tokens):
    """Each of a chain reads what the one before writes; all share counters and sums."""
    kind, rows, length = LinearKind("nf4", 4096, "BF16", nested=True), 4096, 20
    layers = [make(kind, rows) for _ in range(2)]
    launches = [PackedProduct(kind, weight, num_tokens) for weight, *_ in layers]
    first = torch.randn(num_tokens, kind.columns, device=DEVICE, dtype=torch.bfloat16) / 64

    def run_chain(after_each):
        values = [first, *(torch.empty_like(first) for _ in range(length))]
        for i in range(length):
            launches[i % 2].queue(values[i], values[i + 1])
            after_each()
        return values

    one_by_one = run_chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = run_chain(lambda: None)
    for _ in range(3):
        for value in together[1:]:
            value.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for i, (expected, found) in enumerate(zip(one_by_one, together, strict=True)):
            assert expected.isfinite().all() and torch.equal(expected, found), i
