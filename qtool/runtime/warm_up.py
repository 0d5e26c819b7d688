"""Kernels made ready while weights load.

What a packed layer needs by itself is known from its sizes. What the fused decoder needs is guessed
from the names of the usual block: a kernel that is not wanted after all costs time in the
background and a file in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from cupy_kernels import linear_many
from cupy_kernels.linear_few import OLDEST_COMPUTE_CAPABILITY, LinearKind, compile_for, fits
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.linear import FourBitLayer, PackedLayer

NUM_THREADS: Final = 4
# Tokens that the decoder compares, those of a chunk, and of prompts shorter than one.
PROMPT_TOKENS: Final = (4, 128, 256, 512)
# Layers that a launch multiplies together.
TOGETHER: Final = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}


def warm_up_kernels(
    layers: Mapping[str, PackedLayer],
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapted: bool = False,
) -> None:
    """Compile and load kernels for the products of one token and of a prompt with `layers`.

    With `adapted` those that add adapters, which most of a model's layers then have.

    Does nothing where there are none: without a GPU that they run on, or in float32.
    """
    if device.type != "cuda" or dtype not in KERNEL_DTYPES:
        return
    if torch.cuda.get_device_capability(device) < OLDEST_COMPUTE_CAPABILITY:
        return

    def compile_one(compile_it: Callable[[], None]) -> None:
        with torch.cuda.device(device):
            compile_it()

    with ThreadPoolExecutor(NUM_THREADS) as pool, torch.cuda.device(device):
        list(pool.map(compile_one, _programs(layers, dtype, adapted=adapted)))


def _programs(
    layers: Mapping[str, PackedLayer], dtype: torch.dtype, *, adapted: bool
) -> list[Callable[[], None]]:
    """What compiles each of them, those of a token first."""
    kinds = {(kind, count) for kind, count in _kinds(layers, dtype, adapted=adapted) if fits(kind)}
    prompts = {
        (replace(kind, columns=linear_many.CHUNK), shape): (kind, rows, tokens)
        for kind, rows in _prompt_launches(layers, dtype)
        if linear_many.fits(kind)
        for tokens in PROMPT_TOKENS
        for shape in [linear_many.shape_on(rows, kind.columns, tokens)]
    }
    few = [partial(compile_for, kind, count, max_tokens=1) for kind, count in kinds]
    return [*few, *(partial(linear_many.compile_for, *prompt) for prompt in prompts.values())]


def _prompt_launches(
    layers: Mapping[str, PackedLayer], dtype: torch.dtype
) -> Iterator[tuple[LinearKind, tuple[int, ...]]]:
    """Kinds of launches with the rows of their layers."""
    seen = set()
    for name, layer in layers.items():
        prefix, _, last = name.rpartition(".")
        others = [layers.get(f"{prefix}.{other}") for other in TOGETHER.get(last, ())]
        rows = [layer.out_features, *(other.out_features for other in others if other is not None)]
        launch = _kind_of(layer, dtype), tuple(rows)
        if launch not in seen:
            seen.add(launch)
            yield launch


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
