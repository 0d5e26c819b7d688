"""Packed linear layers with random contents, and their weights in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.formats.codebooks import dynamic_map
from qtool.runtime.linear import FourBitLayer, Int8Layer, Linear4bit, LinearInt8

QUANTS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")


def make_layer(
    quant: str,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    bias: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Any:
    """A Linear4bit or LinearInt8 with codes and scales drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    made_bias = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    if quant == "int8":
        layer: Any = LinearInt8(Int8Layer(out_features, in_features), bias=made_bias)
        layer.weight.data = torch.randint(
            -127, 128, layer.weight.shape, generator=generator, dtype=torch.int8
        )
        layer.SCB.copy_(torch.rand(out_features, generator=generator) * 0.2 + 0.05)
        return layer.to(device)
    four_bit = FourBitLayer(
        out_features, in_features, quant[:3], blocksize, dtype, quant.endswith("-dq")
    )
    layer = Linear4bit(four_bit, bias=made_bias)
    layer.weight.data.random_(0, 256, generator=generator)
    if not four_bit.double_quant:
        layer.absmax.copy_(torch.rand(layer.absmax.shape, generator=generator) * 0.05 + 0.02)
        return layer.to(device)
    layer.absmax.random_(0, 256, generator=generator)
    nested = torch.rand(layer.nested_absmax.shape, generator=generator)
    layer.nested_absmax.copy_(nested * 0.01 + 0.01)
    layer.nested_quant_map.copy_(torch.from_numpy(dynamic_map().copy()))
    layer.nested_offset.fill_(0.05)
    return layer.to(device)


def exact_product(layer: Any, x: Tensor) -> Tensor:
    """x times the weight before any rounding, plus the bias: float64 on the CPU."""
    weight = exact_weight(layer)
    product = x.cpu().double() @ weight.T
    return product if layer.bias is None else product + layer.bias.cpu().double()


def exact_weight(layer: Any) -> Tensor:
    """The weight [out, in] in float64, products of codes and scales not rounded."""
    if isinstance(layer, LinearInt8):
        return layer.weight.cpu().double() * layer.SCB.cpu().double()[:, None] / 127
    from qtool.formats.codebooks import CODES

    on_cpu = layer.cpu() if layer.weight.device.type == "cpu" else _copy_to_cpu(layer)
    codes = torch.from_numpy(CODES[on_cpu.layer.quant_type].copy()).double()
    packed = on_cpu.weight.reshape(-1).int()
    values = torch.stack((codes[packed >> 4], codes[packed & 15]), dim=-1).reshape(-1)
    nested = on_cpu.nested
    absmax = (nested.dequantize() if nested else on_cpu.absmax).double()
    scales = absmax.repeat_interleave(on_cpu.layer.blocksize)[: values.numel()]
    return (values * scales).view(on_cpu.out_features, on_cpu.in_features)


def _copy_to_cpu(layer: Any) -> Any:
    from copy import deepcopy

    return deepcopy(layer).cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN stays NaN."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())
