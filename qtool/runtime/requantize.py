"""Floating-point weights to packed tensors, where they lie: what `qtool quantize` writes for them.

    parts = pack_4bit(weight, "nf4", 64, double_quant=True)   # by the names of Linear4bit

On a GPU our kernels read the tensor itself; without CuPy, and on the CPU, the CPU backend packs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.backends.cpu import CpuBackend
from qtool.errors import QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.formats.precisions import NESTED_BLOCKSIZE, QuantType
from qtool.runtime.dequantize_host import SOURCE_DTYPES, as_numpy
from qtool.runtime.products import has_kernels


def pack_4bit(
    weight: Tensor, quant_type: QuantType, blocksize: int, *, double_quant: bool
) -> dict[str, Tensor]:
    """The tensors of `Linear4bit` for a weight.

    Args:
        weight: bfloat16, float16, float32 or float64 (out, in); float64 is rounded to float32.

    Returns:
        On the weight's device, by the names that `Linear4bit` gives its weight and buffers.

    Raises:
        QtoolError: bad_file, if a value is NaN or infinite.
    """
    values = _readable(weight)
    num_values, device = values.numel(), values.device
    packed = torch.empty((num_values + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-num_values // blocksize), dtype=torch.float32, device=device)
    if device.type == "cpu":
        num_bad = CpuBackend().quantize_4bit(
            as_numpy(values).reshape(-1),
            SOURCE_DTYPES[values.dtype],
            quant_type,
            blocksize,
            as_numpy(packed).reshape(-1),
            as_numpy(absmax),
        )
    else:
        num_bad = _launch_4bit(values, quant_type, blocksize, packed, absmax)
    _refuse_nonfinite(num_bad, values)
    parts = {"weight": packed, "absmax": absmax}
    if double_quant:
        parts |= _pack_absmax(absmax)
    return {name: part.to(weight.device) for name, part in parts.items()}


def pack_int8(weight: Tensor) -> dict[str, Tensor]:
    """The same for `LinearInt8`: `weight` int8 (out, in) and `SCB` float32 (out,)."""
    values = _readable(weight)
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scb = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    if values.device.type == "cpu":
        arrays = as_numpy(codes), as_numpy(scb)
        num_bad = CpuBackend().quantize_int8(as_numpy(values), SOURCE_DTYPES[values.dtype], *arrays)
    else:
        num_bad = _launch_int8(values, codes, scb)
    _refuse_nonfinite(num_bad, values)
    return {"weight": codes.to(weight.device), "SCB": scb.to(weight.device)}


def _readable(weight: Tensor) -> Tensor:
    """`weight` as kernels take it: contiguous, aligned, of a dtype they know, where they run."""
    values = weight.detach()
    if values.dtype not in SOURCE_DTYPES:
        values = values.float()
    if values.device.type != "cpu" and not has_kernels(values.device):
        values = values.cpu()
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values


def _refuse_nonfinite(num_bad: int, values: Tensor) -> None:
    if num_bad:
        raise QtoolError(
            f"{num_bad:,} of {values.numel():,} values are NaN or infinite, which no packed weight "
            "can hold",
            kind="bad_file",
            hint="the weight or the adapter added to it is broken",
        )


def _pack_absmax(absmax: Tensor) -> dict[str, Tensor]:
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    num_nested = -(-absmax.numel() // NESTED_BLOCKSIZE)
    nested = torch.empty(num_nested, dtype=torch.float32, device=absmax.device)
    if absmax.device.type == "cpu":
        mean = CpuBackend().quantize_absmax(as_numpy(absmax), as_numpy(codes), as_numpy(nested))
        offset = torch.tensor(float(mean), dtype=torch.float32)
    else:
        offset = _launch_absmax(absmax, codes, nested)
    quant_map = torch.from_numpy(dynamic_map().copy()).to(absmax.device)
    return {
        "absmax": codes,
        "nested_absmax": nested,
        "nested_quant_map": quant_map,
        "nested_offset": offset,
    }


# -- on a GPU: the launchers only queue; asking for the count waits -------------------------------


def _launch_4bit(
    values: Tensor, quant_type: QuantType, blocksize: int, packed: Tensor, absmax: Tensor
) -> int:
    from cupy_kernels.quantize_4bit import quantize_4bit

    bad = torch.zeros(1, dtype=torch.int64, device=values.device)
    with torch.cuda.device(values.device):
        quantize_4bit(
            values.data_ptr(),
            SOURCE_DTYPES[values.dtype],
            values.numel(),
            quant_type,
            blocksize,
            packed.data_ptr(),
            absmax.data_ptr(),
            bad.data_ptr(),
            _stream(values),
        )
    return int(bad.item())


def _launch_absmax(absmax: Tensor, codes: Tensor, nested: Tensor) -> Tensor:
    from cupy_kernels.quantize_absmax import quantize_absmax, workspace_bytes

    num_bytes = workspace_bytes(absmax.numel())
    workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=absmax.device)
    offset = torch.empty((), dtype=torch.float32, device=absmax.device)
    with torch.cuda.device(absmax.device):
        quantize_absmax(
            absmax.data_ptr(),
            absmax.numel(),
            workspace.data_ptr(),
            codes.data_ptr(),
            nested.data_ptr(),
            offset.data_ptr(),
            _stream(absmax),
        )
    return offset


def _launch_int8(values: Tensor, codes: Tensor, scb: Tensor) -> int:
    from cupy_kernels.quantize_int8_rows import quantize_int8_rows

    bad = torch.zeros(1, dtype=torch.int64, device=values.device)
    with torch.cuda.device(values.device):
        quantize_int8_rows(
            values.data_ptr(),
            SOURCE_DTYPES[values.dtype],
            values.shape[0],
            values.shape[1],
            codes.data_ptr(),
            scb.data_ptr(),
            bad.data_ptr(),
            _stream(values),
        )
    return int(bad.item())


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
