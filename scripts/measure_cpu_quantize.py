"""Measure the CPU backend beside bitsandbytes' CPU functions and a memory copy, in one run.

    python scripts/measure_cpu_quantize.py --json cpu.json
    python scripts/measure_cpu_quantize.py --shape 1024x4096 --repeats 5      (a quick look)

Every engine gets the same weights, cut into tiles for `--threads` threads as `qtool quantize`
cuts them. The weights are random, new in every run, and as many as it takes to exceed the caches
several times; each repetition takes the next one, and engines take turns, so that all of them see
the same disturbances. Rates are bytes of the source weight per second. The limit that shares refer
to is a copy of the same bytes by the same threads. qtool writes to memory that it reuses, as its
pipeline does; bitsandbytes allocates its results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.backends.cpu import CpuBackend, describe_cpu
from qtool.formats.floats import NUMPY_DTYPES, narrow
from qtool.formats.tensors import TORCH_NAMES, SourceDtype

ROTATION_BYTES = 512 << 20  # of weights: many times the largest cache of today's CPUs
TILE_BYTES = 4 << 20
BLOCKSIZE = 64

# One engine at work on weight number i.
Work = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One line of the result; times are seconds, `bytes` those of the source weight."""

    op: str
    shape: str
    dtype: str
    engine: str
    seconds_median: float
    seconds_mad: float
    n: int
    bytes: int
    bytes_per_s: float
    share_of_limit: float


class Weights:
    """Random weights of one shape and dtype, and room for what the operations write."""

    def __init__(self, shape: tuple[int, int], dtype: SourceDtype, num_threads: int) -> None:
        self.shape, self.dtype, self.num_threads = shape, dtype, num_threads
        size = shape[0] * shape[1]
        self.nbytes = size * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        rng = np.random.default_rng()
        self.rotation: list[NDArray[Any]] = [
            narrow(rng.standard_normal(size, np.float32) * np.float32(0.02), dtype)
            for _ in range(max(2, -(-ROTATION_BYTES // self.nbytes)))
        ]
        self.copied = np.empty_like(self.rotation[0])
        self.packed = np.empty(-(-size // 2), np.uint8)
        self.absmax = np.empty(-(-size // BLOCKSIZE), np.float32)
        self.nested_codes = np.empty(self.absmax.size, np.uint8)
        self.nested_absmax = np.empty(-(-self.absmax.size // 256), np.float32)
        self.codes = np.empty(shape, np.int8)
        self.scb = np.empty(shape[0], np.float32)

    def tiles(self) -> list[slice]:
        """Whole rows of about TILE_BYTES; rows times BLOCKSIZE make whole blocks in any case."""
        row_bytes = self.nbytes // self.shape[0]
        rows = max(1, TILE_BYTES // row_bytes // BLOCKSIZE) * BLOCKSIZE
        step = rows * self.shape[1]
        size = self.shape[0] * self.shape[1]
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def copy_work(weights: Weights, pool: ThreadPoolExecutor) -> Work:
    """The limit: read a weight, write it elsewhere."""

    def work(i: int) -> None:
        source = weights.rotation[i % len(weights.rotation)]

        def tile(part: slice) -> None:
            np.copyto(weights.copied[part], source[part])

        list(pool.map(tile, weights.tiles()))

    return work


def qtool_4bit_work(weights: Weights, pool: ThreadPoolExecutor, quant: str) -> Work:
    """Tiles by all threads; double quantization by one, at the end, as it needs every absmax."""
    backend = CpuBackend()
    quant_type = "nf4" if quant.startswith("nf4") else "fp4"

    def work(i: int) -> None:
        source = weights.rotation[i % len(weights.rotation)]

        def tile(part: slice) -> None:
            backend.quantize_4bit(
                source[part],
                weights.dtype,
                quant_type,
                BLOCKSIZE,
                weights.packed[part.start // 2 : -(-part.stop // 2)],
                weights.absmax[part.start // BLOCKSIZE : -(-part.stop // BLOCKSIZE)],
            )

        list(pool.map(tile, weights.tiles()))
        if quant.endswith("-dq"):
            backend.quantize_absmax(weights.absmax, weights.nested_codes, weights.nested_absmax)

    return work


def qtool_int8_work(weights: Weights, pool: ThreadPoolExecutor) -> Work:
    """LLM.int8() rows."""
    backend = CpuBackend()
    columns = weights.shape[1]

    def work(i: int) -> None:
        source = weights.rotation[i % len(weights.rotation)].reshape(weights.shape)

        def tile(part: slice) -> None:
            rows = slice(part.start // columns, part.stop // columns)
            backend.quantize_int8(
                source[rows], weights.dtype, weights.codes[rows], weights.scb[rows]
            )

        list(pool.map(tile, weights.tiles()))

    return work


def qtool_dequantize_work(weights: Weights, pool: ThreadPoolExecutor) -> Work:
    """NF4 back to the weight's dtype."""
    backend = CpuBackend()
    qtool_4bit_work(weights, pool, "nf4")(0)

    def work(i: int) -> None:
        def tile(part: slice) -> None:
            backend.dequantize_4bit(
                weights.packed[part.start // 2 : -(-part.stop // 2)],
                weights.absmax[part.start // BLOCKSIZE : -(-part.stop // BLOCKSIZE)],
                "nf4",
                BLOCKSIZE,
                weights.dtype,
                weights.copied[part],
            )

        list(pool.map(tile, weights.tiles()))

    return work


def bitsandbytes_works(weights: Weights, num_threads: int) -> dict[str, Work]:
    """bitsandbytes' CPU functions on the same memory; empty where it is not installed."""
    try:
        import bitsandbytes.functional as functional
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(num_threads)
    dtype = getattr(torch, TORCH_NAMES[weights.dtype])
    tensors = [
        torch.from_numpy(values.view(np.int16) if weights.dtype == "BF16" else values)
        .view(dtype)
        .reshape(weights.shape)
        for values in weights.rotation
    ]

    def four_bit(quant: str) -> Work:
        def work(i: int) -> None:
            functional.quantize_4bit(
                tensors[i % len(tensors)],
                blocksize=BLOCKSIZE,
                quant_type=quant.removesuffix("-dq"),
                compress_statistics=quant.endswith("-dq"),
            )

        return work

    packed, state = functional.quantize_4bit(tensors[0], blocksize=BLOCKSIZE, quant_type="nf4")
    return {
        **{f"quantize {quant}": four_bit(quant) for quant in ("nf4", "nf4-dq", "fp4")},
        "quantize int8": lambda i: functional.int8_vectorwise_quant(
            tensors[i % len(tensors)].half()
        ),
        "dequantize nf4": lambda i: functional.dequantize_4bit(packed, state),
    }


def measure(works: dict[tuple[str, str], Work], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of `repeats` runs each; all take turns, after one run each to warm up."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for i in range(-1, repeats):
        for key, work in works.items():
            start = time.perf_counter()
            work(i)
            if i >= 0:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def rows_of(weights: Weights, repeats: int) -> list[Row]:
    """Measure everything for one shape and dtype."""
    with ThreadPoolExecutor(weights.num_threads) as pool:
        works: dict[tuple[str, str], Work] = {("copy", "numpy"): copy_work(weights, pool)}
        for quant in ("nf4", "nf4-dq", "fp4"):
            works[f"quantize {quant}", "qtool"] = qtool_4bit_work(weights, pool, quant)
        works["quantize int8", "qtool"] = qtool_int8_work(weights, pool)
        works["dequantize nf4", "qtool"] = qtool_dequantize_work(weights, pool)
        for op, work in bitsandbytes_works(weights, weights.num_threads).items():
            works[op, "bitsandbytes"] = work
        seconds = measure(works, repeats)
    limit = weights.nbytes / statistics.median(seconds["copy", "numpy"])
    return [_row(weights, op, engine, times, limit) for (op, engine), times in seconds.items()]


def _row(weights: Weights, op: str, engine: str, times: list[float], limit: float) -> Row:
    median = statistics.median(times)
    return Row(
        op=op,
        shape="x".join(map(str, weights.shape)),
        dtype=weights.dtype,
        engine=engine,
        seconds_median=median,
        seconds_mad=statistics.median(abs(seconds - median) for seconds in times),
        n=len(times),
        bytes=weights.nbytes,
        bytes_per_s=weights.nbytes / median,
        share_of_limit=weights.nbytes / median / limit,
    )


def print_table(rows: list[Row]) -> None:
    """One line per operation and engine; the ratio is to bitsandbytes at the same operation."""
    rates = {(row.op, row.dtype): row.bytes_per_s for row in rows if row.engine == "bitsandbytes"}
    print(
        f"{'op':<16}{'shape':<12}{'dtype':<7}{'engine':<14}{'ms':>9}{'± ms':>7}{'GB/s':>8}", end=""
    )
    print(f"{'of copy':>9}{'ratio':>8}")
    for row in rows:
        rival = rates.get((row.op, row.dtype))
        ratio = f"{row.bytes_per_s / rival:.1f}x" if rival and row.engine == "qtool" else ""
        print(
            f"{row.op:<16}{row.shape:<12}{row.dtype:<7}{row.engine:<14}"
            f"{row.seconds_median * 1e3:>9.2f}{row.seconds_mad * 1e3:>7.2f}"
            f"{row.bytes_per_s / 1e9:>8.2f}{row.share_of_limit:>9.0%}{ratio:>8}"
        )


def versions() -> dict[str, str]:
    """Of Python and of every package that takes part."""
    found = {"python": platform.python_version()}
    for package in ("qtool", "numpy", "numba", "llvmlite", "torch", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="4096x14336", help="rows x columns of the weight")
    parser.add_argument("--dtype", action="append", choices=list(NUMPY_DTYPES), help="[all]")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def main() -> None:
    """Measure, print, save."""
    arguments = parse_arguments()
    num_rows, num_columns = (int(size) for size in arguments.shape.split("x"))
    rows: list[Row] = []
    for dtype in arguments.dtype or NUMPY_DTYPES:
        rows += rows_of(
            Weights((num_rows, num_columns), dtype, arguments.threads), arguments.repeats
        )
    print_table(rows)
    if arguments.json:
        copies = [row.bytes_per_s for row in rows if row.op == "copy"]
        document = {
            "device": f"{describe_cpu()}, {arguments.threads} threads used",
            "versions": versions(),
            "limits": {"copy_bytes_per_s": statistics.median(copies)},
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
