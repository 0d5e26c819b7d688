"""`qtool bench` on an NVIDIA GPU: all engines take part, and every result is checked."""

from __future__ import annotations

import pytest

from qtool.bench.kernels import KernelRequest, bench_kernels
from qtool.bench.operations import OPERATIONS, PRODUCTS

CODECS = ("quantize", "dequantize")

pytestmark = pytest.mark.gpu


def bench(shape, dtype, *, words=CODECS, **options):
    return bench_kernels(
        KernelRequest(shapes=(shape,), dtypes=(dtype,), words=words, backend="cuda", **options)
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(4096, 4096), (37, 1000), (3, 131)])
def test_every_operation_gives_the_reference_s_bytes(shape, dtype):
    result = bench(shape, dtype, with_rival=False)
    assert [row.op for row in result.rows] == ["copy", *(op.name for op in OPERATIONS)]
    assert all(row.seconds_median > 0 for row in result.rows)


def test_bitsandbytes_takes_turns_on_the_same_stream():
    pytest.importorskip("bitsandbytes")
    result = bench((4096, 4096), "BF16")
    rivals = {row.op for row in result.rows if row.engine == "bitsandbytes"}
    assert rivals == {op.name for op in OPERATIONS} - {"dequantize int8"}
    copy = next(row for row in result.rows if row.engine == "limit")
    # A copy whose time were not the device's own would seem quicker than any memory is.
    assert 0.05e12 < copy.bytes_per_s < 20e12


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 2048), (192, 320)])
def test_products_are_timed_in_graphs_and_are_as_exact_as_their_rivals(shape, dtype):
    pytest.importorskip("bitsandbytes")
    result = bench(shape, dtype, words=("linear",), tokens=(1, 8, 64))
    assert result.warnings == ()
    for tokens in (1, 8, 64):
        rows = [row for row in result.rows if row.tokens == tokens]
        for product in (p for p in PRODUCTS if p.min_tokens <= tokens):
            by_engine = {row.engine: row for row in rows if row.op == product.name}
            assert by_engine.keys() == {"qtool", "bitsandbytes", "torch"}
            assert 0 < by_engine["qtool"].relative_error < (4e-3 if dtype == "BF16" else 1e-3)
            assert all(row.seconds_median > 0 for row in by_engine.values())
        copy = next(row for row in rows if row.engine == "limit")
        assert 0.05e12 < copy.bytes_per_s < 20e12


def test_a_graph_takes_about_as_long_as_its_launches_say():
    """The clock divides by the number of launches: a matrix cannot be read faster than copied."""
    result = bench((8192, 8192), "BF16", words=("linear nf4",), with_rival=False)
    (own,) = (row for row in result.rows if row.engine == "torch")
    assert 0.2 < own.share_of_limit < 1.5
