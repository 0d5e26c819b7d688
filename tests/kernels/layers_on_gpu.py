"""Packed layers with random contents on an NVIDIA GPU, as addresses and in float64."""

from __future__ import annotations

from typing import Any

import torch

from cupy_kernels.linear_few import LinearKind, LinearWeight
from qtool.formats.codebooks import CODES, dynamic_map

DEVICE = "cuda"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
LARGEST_ERROR = {"BF16": 2.5e-3, "F16": 4e-4}
ABSMAX_GROUP = 256


def make(kind: LinearKind, rows: int) -> tuple[LinearWeight, torch.Tensor, list[torch.Tensor]]:
    """A layer, its weight in float64, and what has to stay alive."""
    if kind.format == "int8":
        return _make_int8(kind, rows)
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


def _make_int8(
    kind: LinearKind, rows: int
) -> tuple[LinearWeight, torch.Tensor, list[torch.Tensor]]:
    codes = torch.randint(-128, 128, (rows, kind.columns), dtype=torch.int8, device=DEVICE)
    scb = torch.rand(rows, device=DEVICE) + 0.1
    bias = torch.randn(rows, device=DEVICE).to(DTYPES[kind.dtype])
    weight = LinearWeight(rows, codes.data_ptr(), scb.data_ptr(), bias=bias.data_ptr())
    return weight, codes.double() * scb.double()[:, None] / 127, [codes, bias, scb]
