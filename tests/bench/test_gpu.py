"""`bench_kernels` on an NVIDIA GPU: all engines take part, and every result is checked."""

from __future__ import annotations

import pytest

from qtool.bench.kernels import KernelRequest, bench_kernels
from qtool.bench.operations import OPERATIONS

pytestmark = pytest.mark.gpu


def bench(shape, dtype, **options):
    return bench_kernels(KernelRequest(shapes=(shape,), dtypes=(dtype,), backend="cuda", **options))


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
