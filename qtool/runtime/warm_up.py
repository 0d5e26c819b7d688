"""Kernels made ready while weights load.

What a packed layer needs by itself is known from its sizes. What the fused decoder needs is guessed
from the names of the usual block: a kernel that is not wanted after all costs time in the
background and a file in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import torch

from cupy_kernels.linear_few import OLDEST_COMPUTE_CAPABILITY, LinearKind, compile_for, fits
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.linear import FourBitLayer, PackedLayer

NUM_THREADS: Final = 4


def warm_up_kernels(
    layers: Mapping[str, PackedLayer],
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapted: bool = False,
) -> None:
    """Compile and load kernels for the products of one token with `layers`.

    With `adapted` those that add adapters, which most of a model's layers then have.

    Does nothing where there are none: without a GPU that they run on, or in float32.
    """
    if device.type != "cuda" or dtype not in KERNEL_DTYPES:
        return
    if torch.cuda.get_device_capability(device) < OLDEST_COMPUTE_CAPABILITY:
        return
    kinds = _kinds(layers, dtype, adapted=adapted)
    wanted = {(kind, count) for kind, count in kinds if fits(kind)}

    def compile_one(kind_and_count: tuple[LinearKind, int]) -> None:
        with torch.cuda.device(device):
            compile_for(*kind_and_count, max_tokens=1)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(compile_one, wanted))


def _kinds(
    layers: Mapping[str, PackedLayer], dtype: torch.dtype, *, adapted: bool
) -> Iterator[tuple[LinearKind, int]]:
    """Kinds of launches with the number of layers in one."""
    for name, layer in layers.items():
        kind = _kind_of(layer, dtype)
        yield kind, 1
        kind = replace(kind, adapted=adapted)
        match name.rpartition(".")[2]:
            case "q_proj":
                yield replace(kind, norm="rms"), 3
            case "o_proj" | "down_proj":
                yield replace(kind, epilogue="residual"), 1
            case "gate_proj":
                yield replace(kind, norm="rms", epilogue="gated"), 2


def _kind_of(layer: PackedLayer, dtype: torch.dtype) -> LinearKind:
    if not isinstance(layer, FourBitLayer):
        return LinearKind("int8", layer.in_features, KERNEL_DTYPES[dtype])
    return LinearKind(
        layer.quant_type,
        layer.in_features,
        KERNEL_DTYPES[dtype],
        blocksize=layer.blocksize,
        nested=layer.double_quant,
    )
