"""Dequantizing tensors in host memory with the CPU backend's kernels, on PyTorch's thread count.

Ten times as fast as torch's own operators there, which wait for all threads at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.backends.cpu import CpuBackend
from qtool.formats.precisions import QuantType
from qtool.formats.tensors import SourceDtype

SOURCE_DTYPES: Final[dict[torch.dtype, SourceDtype]] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
# What products of packed layers compute in on a GPU, by our kernels.
KERNEL_DTYPES: Final[dict[torch.dtype, SourceDtype]] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
MIN_ELEMENTS_PER_THREAD: Final = 1 << 18  # below, handing work over takes longer than the work


def dequantize_blocks(
    packed: Tensor, absmax: Tensor, quant_type: QuantType, blocksize: int, out: Tensor
) -> None:
    """Fill `out` (n,): `packed` is uint8 (ceil(n/2),), `absmax` float32 (ceil(n/blocksize),)."""
    codes, scales, values = as_numpy(packed), as_numpy(absmax), as_numpy(out)
    dtype, backend = SOURCE_DTYPES[out.dtype], CpuBackend()

    def work(first: int, last: int) -> None:
        start, stop = first * blocksize, min(last * blocksize, values.size)
        backend.dequantize_4bit(
            codes[start // 2 : (stop + 1) // 2],
            scales[first:last],
            quant_type,
            blocksize,
            dtype,
            values[start:stop],
        )

    _divide(scales.size, values.size, work)


def dequantize_rows(codes: Tensor, scb: Tensor, out: Tensor) -> None:
    """Fill `out` (r, c) from `codes` int8 (r, c) and `scb` float32 (r,)."""
    integers, scales, values = as_numpy(codes), as_numpy(scb), as_numpy(out)
    dtype, backend = SOURCE_DTYPES[out.dtype], CpuBackend()

    def work(first: int, last: int) -> None:
        rows = slice(first, last)
        backend.dequantize_int8(integers[rows], scales[rows], dtype, values[rows])

    _divide(scales.size, values.size, work)


def _divide(num_units: int, num_elements: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` for ranges of units that cover them all, on several threads."""
    num_ranges = min(torch.get_num_threads(), num_elements // MIN_ELEMENTS_PER_THREAD, num_units)
    if num_ranges <= 1:
        work(0, num_units)
        return
    edges = [num_units * i // num_ranges for i in range(num_ranges + 1)]
    # The caller takes the first range itself.
    others = [_pool(num_ranges - 1).submit(work, *edges[i : i + 2]) for i in range(1, num_ranges)]
    work(*edges[:2])
    for other in others:
        other.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="dequantize")


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory; bfloat16 as its bits, which NumPy has no type for."""
    data = tensor.detach()
    if data.dtype == torch.bfloat16:
        return data.view(torch.int16).numpy().view(np.uint16)
    return data.numpy()
