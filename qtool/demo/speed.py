"""How fast the quantization kernels are, without files around them.

The demo's model is so small that opening and syncing its files is all that its run takes.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qtool.backends.protocol import Backend
from qtool.formats.precisions import NESTED_BLOCKSIZE

SHAPE: Final = (4096, 4096)  # an attention weight of an 8 billion parameter model
BLOCKSIZE: Final = 64
NUM_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """The best of some runs over a bf16 weight of `shape`: bytes read, and the time."""

    shape: tuple[int, int]
    input_bytes: int
    seconds: float
    num_threads: int


def measure_speed(backend: Backend, num_threads: int) -> KernelSpeed:
    """Quantize a random weight to NF4 with double quantization, in memory."""
    weight = _random_bf16(SHAPE)
    seconds = min(_time_once(backend, weight, num_threads) for _ in range(NUM_RUNS + 1))
    return KernelSpeed(SHAPE, weight.nbytes, seconds, num_threads)


def _random_bf16(shape: tuple[int, int]) -> NDArray[np.uint16]:
    """Normally distributed values as bfloat16 bits: uint16 (num_values,)."""
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).reshape(-1)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _time_once(backend: Backend, weight: NDArray[np.uint16], num_threads: int) -> float:
    """Seconds; the first call compiles the kernels too."""
    blocks = weight.reshape(-1, BLOCKSIZE)
    packed = np.empty((len(blocks), BLOCKSIZE // 2), np.uint8)
    absmax = np.empty(len(blocks), np.float32)
    codes = np.empty(absmax.size, np.uint8)
    nested_absmax = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
    parts = [np.array_split(array, num_threads) for array in (blocks, packed, absmax)]
    with ThreadPoolExecutor(num_threads) as pool:
        start_s = time.perf_counter()
        runs = [
            pool.submit(
                backend.quantize_4bit, values.ravel(), "BF16", "nf4", BLOCKSIZE, out.ravel(), scales
            )
            for values, out, scales in zip(*parts, strict=True)
        ]
        for run in runs:
            run.result()
        backend.quantize_absmax(absmax, codes, nested_absmax)
        return time.perf_counter() - start_s
