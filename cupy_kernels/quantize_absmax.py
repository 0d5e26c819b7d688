"""Launches quantize_absmax.cu: double quantization of absmax in one cooperative launch."""

from __future__ import annotations

from cupy_kernels.launch import ceil_div, check_aligned, launch, num_multiprocessors
from cupy_kernels.loader import load_kernel
from qtool.formats.double_quant import SUM_GROUP

_THREADS = 1024
_ARRIVALS_BYTES = 16  # the counter at which blocks meet, before the sums


def workspace_bytes(count: int) -> int:
    """Bytes of workspace for `count` absmax: a counter, then the sums of all levels in float64."""
    num_sums = total = ceil_div(count, SUM_GROUP)
    while num_sums > 1:
        num_sums = ceil_div(num_sums, SUM_GROUP)
        total += num_sums
    return _ARRIVALS_BYTES + 8 * total


def quantize_absmax(
    absmax: int,
    count: int,
    workspace: int,
    codes: int,
    nested_absmax: int,
    offset: int,
    stream: int,
) -> None:
    """Queue double quantization of `count` > 0 absmax on `stream`.

    Args:
        absmax: address of float32 (count,), 16-byte aligned.
        workspace: address of `workspace_bytes(count)` bytes, 16-byte aligned, whose first 16 were
            zero before the first launch on it; launches that share it must not overlap.
        codes: address of uint8 (count,), 16-byte aligned, filled.
        nested_absmax: address of float32 (ceil(count/256),), filled.
        offset: address of a float32, filled with the mean of absmax.

    Raises:
        ValueError: no absmax, which have no mean, or an address that is not aligned.
    """
    if count < 1:
        raise ValueError(f"{count} absmax have no mean")
    check_aligned(absmax=absmax, workspace=workspace, codes=codes)
    kernel = load_kernel("quantize_absmax", cooperative=True)
    blocks_wanted = ceil_div(count, SUM_GROUP * (_THREADS // 32))
    # One block of 1024 threads is resident on each, on every architecture.
    grid = (min(blocks_wanted, num_multiprocessors()),)
    sums = workspace + _ARRIVALS_BYTES
    arguments = (absmax, count, sums, workspace, codes, nested_absmax, offset)
    launch(kernel, grid, _THREADS, arguments, stream)
