"""Kernels made ready while weights load.

What a packed layer needs by itself is known from its sizes. What the fused decoder needs is guessed
from the config and the names of the usual block: a kernel that is not wanted after all costs time
in the background and a file in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from cupy_kernels import linear_many
from cupy_kernels.linear_few import (
    OLDEST_COMPUTE_CAPABILITY,
    LinearKind,
    Norm,
    compile_for,
    fits,
)
from qtool.defaults import PREFILL_CHUNK
from qtool.runtime.decoders.blocks import ACTIVATION_NAMES, GATES, PLUS_ONE_TYPES
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.linear import FourBitLayer, PackedLayer

NUM_THREADS: Final = 4
# Tokens that the decoder compares, of prompts shorter than a chunk, and of one.
PROMPT_TOKENS: Final = (4, 128, 256, 512, PREFILL_CHUNK)
# Layers that a launch multiplies together.
TOGETHER: Final = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}


def warm_up_kernels(
    config: Any,
    layers: Mapping[str, PackedLayer],
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapted: bool = False,
) -> None:
    """Compile and load kernels for the products of one token and of a prompt with `layers`.

    Does nothing where there are none: without a GPU that they run on, or in float32.

    Args:
        config: transformers' of the model.
        layers: the packed ones, by name.
        dtype: of activations.
        adapted: kernels that add adapters, which most of a model's layers then have.
    """
    if device.type != "cuda" or dtype not in KERNEL_DTYPES:
        return
    if torch.cuda.get_device_capability(device) < OLDEST_COMPUTE_CAPABILITY:
        return

    def compile_one(compile_it: Callable[[], None]) -> None:
        # The fused decoder is not to be had with more columns than a kernel holds beside a norm.
        with torch.cuda.device(device), suppress(ValueError):
            compile_it()

    with ThreadPoolExecutor(NUM_THREADS) as pool, torch.cuda.device(device):
        list(pool.map(compile_one, _programs(config, layers, dtype, adapted=adapted)))


def _programs(
    config: Any, layers: Mapping[str, PackedLayer], dtype: torch.dtype, *, adapted: bool
) -> list[Callable[[], None]]:
    """What compiles each of them, those of a token first."""
    guessed = _kinds(config, layers, dtype, adapted=adapted)
    kinds = {(kind, count) for kind, count in guessed if fits(kind)}
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
    config: Any, layers: Mapping[str, PackedLayer], dtype: torch.dtype, *, adapted: bool
) -> Iterator[tuple[LinearKind, int]]:
    """Kinds of launches with the number of layers in one."""
    text = config.get_text_config()
    norm: Norm = "rms_plus_one" if text.model_type in PLUS_ONE_TYPES else "rms"
    activation = getattr(text, ACTIVATION_NAMES.get(text.model_type, "hidden_act"), "silu")
    gate = GATES.get(activation, "silu")
    for name, layer in layers.items():
        kind = _kind_of(layer, dtype)
        yield kind, 1
        kind = replace(kind, adapted=adapted)
        match name.rpartition(".")[2]:
            case "q_proj" | "qkv_proj":
                yield replace(kind, norm=norm), 3
            case "o_proj" | "down_proj":
                yield replace(kind, epilogue="residual"), 1
            case "gate_proj" | "gate_up_proj":
                yield replace(kind, norm=norm, epilogue="gated", gate=gate), 2


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
