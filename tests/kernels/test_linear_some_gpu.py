"""On an NVIDIA GPU: each shape of thread blocks against float64, whatever it shares tiles with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cupy_kernels.linear_few import LinearKind, LinearWeight, Tokens, shared_memory
from cupy_kernels.linear_some import COUNTER_BYTES, GROUP_TUNINGS, LinearSome, plan_with
from cupy_kernels.loader import compiles_for
from qtool.formats.codebooks import CODES, dynamic_map

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
LARGEST_ERROR = {"BF16": 2.5e-3, "F16": 4e-4}
ABSMAX_GROUP = 256
# Tiles that one thread block has, that two cut, that many share; some that are not full.
KINDS = (
    (LinearKind("nf4", 4096, "BF16", nested=True), 40_000),
    (LinearKind("nf4", 14336, "BF16", nested=True), 1000),
    (LinearKind("fp4", 1408, "F16", blocksize=128), 301),
    (LinearKind("nf4", 64, "BF16", blocksize=64), 131),
)


def make(kind: LinearKind, rows: int) -> tuple[LinearWeight, torch.Tensor, list[torch.Tensor]]:
    """A layer, its weight in float64, and what has to stay alive."""
    count = rows * kind.columns
    packed = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=DEVICE)
    code = torch.from_numpy(CODES[kind.format].copy()).to(DEVICE).double()
    values = torch.stack((code[packed.int() >> 4], code[packed.int() & 15]), -1).reshape(-1)
    blocks = -(-count // kind.blocksize)
    bias = torch.randn(rows, device=DEVICE).to(DTYPES[kind.dtype])
    addresses: dict[str, Any] = {"bias": bias.data_ptr()}
    if kind.nested:
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE)
        nested = torch.rand(-(-blocks // ABSMAX_GROUP), device=DEVICE) * 0.01 + 0.01
        entries = torch.from_numpy(dynamic_map().copy()).to(DEVICE)
        offset = torch.full((), 0.05, device=DEVICE)
        kept = [packed, bias, codes, nested, entries, offset]
        absmax = entries[codes.long()] * nested.repeat_interleave(ABSMAX_GROUP)[:blocks] + offset
        addresses |= {
            "absmax_codes": codes.data_ptr(),
            "nested_absmax": nested.data_ptr(),
            "nested_quant_map": entries.data_ptr(),
            "nested_offset": offset.data_ptr(),
        }
    else:
        absmax = torch.rand(blocks, device=DEVICE) * 0.05 + 0.02
        kept = [packed, bias, absmax]
        addresses["absmax"] = absmax.data_ptr()
    dense = values * absmax.double().repeat_interleave(kind.blocksize)[:count]
    return LinearWeight(rows, packed.data_ptr(), **addresses), dense.view(rows, -1), kept


@pytest.mark.parametrize(("kind", "rows"), KINDS)
@pytest.mark.parametrize(
    ("tokens", "tuning"),
    [(tokens, tuning) for tokens, found in GROUP_TUNINGS.items() for tuning in found],
)
def test_products_of_warpgroups_are_near_float64(tokens, tuning, kind, rows):
    if not compiles_for("sm_90"):
        pytest.skip("warpgroups are Hopper's")
    weight, dense, kept = make(kind, rows)
    plan = plan_with(tuning, kind, rows, tokens, shared_memory(torch.cuda.current_device()))
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
