"""The launches of the fused path on the processor: what their kernels do, in plain PyTorch.

    with launches_on_the_cpu(): FusedNetwork(model, 48, batch=1, capacity=128).prepare(cache)

They read and write the addresses that they are given, with the strides that they are given, and
round where kernels round. So that they say what the host side of the path makes of a model, and
nothing of the kernels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from cupy_kernels.adapter_inner import InnerKind
from cupy_kernels.decode_attention import AttentionShape, AttentionTensors
from cupy_kernels.dequantize_4bit import NestedAbsmax
from cupy_kernels.linear_few import (
    AdapterWeight,
    LinearKind,
    LinearWeight,
    NormWeight,
    Tokens,
)
from qtool.formats.codebooks import CODES
from qtool.runtime.decoders import fused, fused_adapters, fused_attention, fused_prompt
from qtool.runtime.int8_products import multiply_rounded_host

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@contextmanager
def launches_on_the_cpu() -> Iterator[None]:
    """Of a fused path that is made within."""
    replaced: dict[Any, dict[str, Any]] = {
        fused: {"LinearFew": LinearFew, "NormRows": NormRows, "argmax_rows": argmax_rows},
        fused_adapters: {"AdapterInner": AdapterInner},
        fused_attention: {
            "decode_attention": decode_attention,
            "RotaryRows": RotaryRows,
            "workspace_bytes": lambda shape: 16,
        },
        fused_prompt: {
            "NormRows": NormRows,
            "GatedRows": GatedRows,
            "Dequantize4bit": Dequantize4bit,
            "DequantizeInt8Rows": DequantizeInt8Rows,
            "find_outliers": lambda x, threshold: threshold,
            "round_activations": lambda x, threshold: (x, threshold),
            "add_product": add_product,
            "PackedProduct": PackedProduct,
            "counters_of": lambda device, stream: torch.zeros(1),
            "linear_many": SimpleNamespace(fits=is_packed),
            "takes_many": lambda kind, rows, num_tokens: is_packed(kind),
            "many_shape": lambda kind, rows, num_tokens: num_tokens,
            "ManyProducts": ManyProducts,
            "flash_attention": flash_attention,
        },
        torch.cuda: {"current_stream": lambda device: SimpleNamespace(cuda_stream=0)},
    }
    patches = [mock.patch.multiple(owner, **names) for owner, names in replaced.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def at(address: int, dtype: torch.dtype, *shape: int, stride: int | None = None) -> Tensor:
    """What lies at `address`, rows `stride` elements apart."""
    assert address, "a null pointer"
    columns = shape[-1]
    stride = columns if stride is None else stride
    rows = math.prod(shape[:-1])
    count = (rows - 1) * stride + columns
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    flat = torch.frombuffer(raw, dtype=dtype)
    return flat.as_strided((rows, columns), (stride, 1)).view(shape)


# -- products -------------------------------------------------------------------------------------


class LinearFew:
    """See `cupy_kernels.linear_few`."""

    def __init__(
        self,
        kind: LinearKind,
        weights: Sequence[LinearWeight],
        *,
        max_tokens: int,
        norm: NormWeight | None = None,
        adapters: Sequence[AdapterWeight] = (),
    ) -> None:
        assert (norm is None) == (kind.norm == "none")
        assert len(adapters) == (len(weights) if kind.adapted else 0)
        self._kind, self._weights, self._norm = kind, weights, norm
        self._adapters = adapters or [AdapterWeight()] * len(weights)

    def queue(self, tokens: Tokens, stream: int) -> None:
        kind, dtype = self._kind, DTYPES[self._kind.dtype]
        x = at(tokens.x, dtype, tokens.count, kind.columns, stride=tokens.x_stride)
        if self._norm is not None:
            x = normed(x, self._norm, kind.norm)
        if tokens.x_is_there:
            assert at(tokens.x_is_there, torch.int32, 1) == 1, "would wait forever"
        made = []
        for weight, adapter in zip(self._weights, self._adapters, strict=True):
            product = x.float() @ floats_of(kind, weight).T
            if adapter.rank:
                inner = at(
                    tokens.inner + 4 * adapter.first,
                    torch.float32,
                    tokens.count,
                    adapter.rank,
                    stride=tokens.inner_stride,
                )
                product += inner @ at(adapter.b, dtype, weight.rows, adapter.rank).float().T
            if weight.bias:
                product += at(weight.bias, dtype, weight.rows).float()
            made.append(product.to(dtype))
        if kind.epilogue == "gated":
            gate, up = made
            made = [GATES[kind.gate](gate.float()).to(dtype) * up]
        for place, stride, weight, product in zip(
            tokens.outs, tokens.out_strides, self._weights, made, strict=False
        ):
            if kind.epilogue == "residual":
                product += at(
                    tokens.residual,
                    dtype,
                    *product.shape,
                    stride=tokens.residual_stride,
                )
            at(place, dtype, tokens.count, weight.rows, stride=stride).copy_(product)


class AdapterInner:
    """See `cupy_kernels.adapter_inner`."""

    def __init__(
        self,
        kind: InnerKind,
        *,
        a: int,
        scales: int,
        max_tokens: int,
        norm: NormWeight | None = None,
        x_is_there: int = 0,
    ) -> None:
        assert (norm is None) == (kind.norm == "none")
        self._kind, self._norm, self._a, self._scales = kind, norm, a, scales
        self._x_is_there = x_is_there

    def queue(self, tokens: Tokens, stream: int) -> None:
        kind, dtype = self._kind, DTYPES[self._kind.dtype]
        if self._x_is_there:
            x_is_there = at(self._x_is_there, torch.int32, 1)
            assert x_is_there == 0, "the product would begin too early"
            x_is_there.fill_(1)
        x = at(tokens.x, dtype, tokens.count, kind.columns, stride=tokens.x_stride)
        if self._norm is not None:
            x = normed(x, self._norm, kind.norm)
        made = x.float() @ at(self._a, dtype, kind.rows, kind.columns).float().T
        made *= at(self._scales, torch.float32, kind.rows)
        at(tokens.inner, torch.float32, tokens.count, kind.rows).copy_(made)


class PackedProduct:
    """See `qtool.runtime.packed_products`."""

    sum_bytes = 16

    def __init__(self, kind: LinearKind, weight: LinearWeight, num_tokens: int) -> None:
        assert is_packed(kind)
        self._launch = LinearFew(kind, [weight], max_tokens=num_tokens)

    def queue_at(self, tokens: Tokens, stream: int, *, counters: int, sums: int) -> None:
        assert counters and sums
        self._launch.queue(tokens, stream)


class ManyProducts:
    """See `qtool.runtime.packed_products`."""

    def __init__(self, kind: LinearKind, weights: Sequence[LinearWeight], num_tokens: int) -> None:
        assert is_packed(kind)
        self._kind, self._weights = kind, weights

    def queue_at(self, tokens: Tokens, stream: int) -> None:
        assert not tokens.residual or len(tokens.outs) == 1
        kind, count, dtype = self._kind, tokens.count, DTYPES[self._kind.dtype]
        x = at(tokens.x, dtype, count, kind.columns, stride=tokens.x_stride).float()
        places = zip(self._weights, tokens.outs, tokens.out_strides, strict=True)
        for weight, out, stride in places:
            floats = floats_of(kind, weight)
            if kind.format != "int8":  # whose sums are scaled
                floats = floats.to(dtype).float()
            made = x @ floats.t()
            if weight.bias:
                made += at(weight.bias, dtype, 1, weight.rows).float()
            if tokens.residual:
                stride_before = tokens.residual_stride
                made += at(tokens.residual, dtype, count, weight.rows, stride=stride_before).float()
            at(out, dtype, count, weight.rows, stride=stride).copy_(made)


def is_packed(kind: LinearKind) -> bool:
    return kind.format != "plain"


def floats_of(kind: LinearKind, weight: LinearWeight) -> Tensor:
    """float32 (rows, columns)."""
    shape = weight.rows, kind.columns
    if kind.format == "plain":
        return at(weight.weight, DTYPES[kind.dtype], *shape).float()
    if kind.format == "int8":
        return int8_floats(weight.weight, weight.absmax, *shape)
    absmax: int | NestedAbsmax = weight.absmax
    if kind.nested:
        absmax = NestedAbsmax(
            weight.absmax_codes,
            weight.nested_absmax,
            weight.nested_quant_map,
            weight.nested_offset,
        )
    return four_bit_floats(
        weight.weight, math.prod(shape), absmax, kind.format, kind.blocksize
    ).view(shape)


def int8_floats(codes: int, scb: int, num_rows: int, row_size: int) -> Tensor:
    scale = at(scb, torch.float32, num_rows) / 127
    return at(codes, torch.int8, num_rows, row_size).float() * scale[:, None]


def four_bit_floats(
    packed: int, num_values: int, absmax: int | NestedAbsmax, quant_type: str, blocksize: int
) -> Tensor:
    codes = at(packed, torch.uint8, num_values // 2)
    both = torch.stack((codes >> 4, codes & 15), dim=1).view(-1, blocksize)
    values = torch.from_numpy(CODES[quant_type].copy())[both.long()]  # type: ignore[index]
    return (values * absmax_of(absmax, num_values // blocksize)[:, None]).view(-1)


def absmax_of(absmax: int | NestedAbsmax, count: int) -> Tensor:
    if isinstance(absmax, int):
        return at(absmax, torch.float32, count)
    groups = torch.arange(count) // 256
    table = at(absmax.nested_code, torch.float32, 256)
    nested = at(absmax.nested_absmax, torch.float32, int(groups[-1]) + 1)
    codes = at(absmax.codes, torch.uint8, count)
    return table[codes.long()] * nested[groups] + at(absmax.nested_offset, torch.float32, 1)


class Dequantize4bit:
    """See `cupy_kernels.dequantize_4bit`."""

    def __init__(
        self,
        packed: int,
        num_values: int,
        absmax: int | NestedAbsmax,
        quant_type: str,
        blocksize: int,
        dtype: str,
    ) -> None:
        self._source = packed, num_values, absmax, quant_type, blocksize
        self._dtype = DTYPES[dtype]

    def queue(self, values: int, stream: int) -> None:
        made = four_bit_floats(*self._source)
        at(values, self._dtype, made.numel()).copy_(made)


def add_product(
    rounded: tuple[Tensor, float],
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    added: bool,
) -> None:
    x, threshold = rounded
    made = multiply_rounded_host(x, codes, scb, bias, threshold)
    out.copy_(out + made if added else made)


class DequantizeInt8Rows:
    """See `cupy_kernels.dequantize_int8_rows`."""

    def __init__(self, codes: int, num_rows: int, row_size: int, scb: int, dtype: str) -> None:
        self._source, self._dtype = (codes, scb, num_rows, row_size), DTYPES[dtype]

    def queue(self, rows: int, stream: int) -> None:
        made = int8_floats(*self._source)
        at(rows, self._dtype, *made.shape).copy_(made)


# -- rows -----------------------------------------------------------------------------------------


def normed(x: Tensor, norm: NormWeight, kind: str) -> Tensor:
    """The RMS norm of the last dimension."""
    weight = at(norm.weight, x.dtype, x.shape[-1])
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
    if kind == "rms_plus_one":
        return (wide * (1 + weight.float())).to(x.dtype)
    assert kind == "rms"
    return wide.to(x.dtype) * weight


class NormRows:
    """See `cupy_kernels.prompt_rows`."""

    def __init__(self, columns: int, dtype: str, kind: str, *, added: bool = False) -> None:
        self._columns, self._dtype = columns, DTYPES[dtype]
        self._kind, self._added = kind, added

    def queue(self, num_rows: int, norm: NormWeight, x: int, out: int, stream: int) -> None:
        source, target = (at(it, self._dtype, num_rows, self._columns) for it in (x, out))
        made = normed(source, norm, self._kind)
        target.copy_(target + made if self._added else made)


class GatedRows:
    """See `cupy_kernels.prompt_rows`."""

    def __init__(self, dtype: str, gate: str) -> None:
        self._dtype, self._gate = DTYPES[dtype], gate

    def queue(self, count: int, gate: int, up: int, out: int, stream: int) -> None:
        gates, ups, target = (at(it, self._dtype, count) for it in (gate, up, out))
        target.copy_(GATES[self._gate](gates.float()).to(self._dtype) * ups)


def argmax_rows(
    values: int, dtype: str, num_rows: int, columns: int, *, workspace: int, out: int
) -> Callable[[int], None]:
    """See `cupy_kernels.argmax_rows`."""

    def launch(stream: int) -> None:
        found = at(values, DTYPES[dtype], num_rows, columns).argmax(-1)
        at(out, torch.int64, num_rows).copy_(found)

    return launch


# -- attention ------------------------------------------------------------------------------------


def flash_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int
) -> Tensor:
    """See `fused_prompt.flash_attention`."""
    tensors = (it.transpose(1, 2) for it in (queries, keys, values))
    return attention(*tensors, scale=scale, window=window).transpose(1, 2)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """(batch, heads, n, head_dim), the last query at the last key."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (it.float().repeat_interleave(group, 1) for it in (keys, values))
    scores = queries.float() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    num_queries, num_keys = scores.shape[-2:]
    key = torch.arange(num_keys, device=scores.device)
    own = key[num_keys - num_queries :, None]
    hidden = key > own
    if window:
        hidden |= key <= own - window
    scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ values).to(queries.dtype)


class _Heads:
    """What both kernels do with queries, keys and values of new tokens."""

    def __init__(self, shape: AttentionShape, tensors: AttentionTensors, epsilon: float) -> None:
        self.shape, self.tensors, self.epsilon = shape, tensors, epsilon
        self.dtype = DTYPES[shape.dtype]
        cache = shape.batch, shape.kv_heads, shape.capacity, shape.head_dim
        self.keys, self.values = (
            at(it, self.dtype, *cache) for it in (tensors.keys, tensors.values)
        )

    def take_up(self, qkv: Tensor, positions: slice) -> Tensor:
        """qkv: (batch, n, size). Queries (batch, heads, n, head_dim); the cache has the rest."""
        shape, tensors = self.shape, self.tensors
        heads = qkv.reshape(*qkv.shape[:-1], -1, shape.head_dim).transpose(1, 2)
        queries, keys, values = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        queries = self._turned(self._normed(queries, tensors.query_norm), positions)
        self.keys[:, :, positions] = self._turned(self._normed(keys, tensors.key_norm), positions)
        self.values[:, :, positions] = values
        return queries

    def _normed(self, heads: Tensor, weight: int) -> Tensor:
        if self.shape.head_norm == "none":
            return heads
        return normed(heads, NormWeight(weight, self.epsilon), self.shape.head_norm)

    def _turned(self, heads: Tensor, positions: slice) -> Tensor:
        half = self.shape.rotary_dim // 2
        tables = (self.tensors.cosines, self.tensors.sines)
        cosines, sines = (
            at(it, torch.float32, self.shape.capacity, half)[positions].to(self.dtype)
            for it in tables
        )
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        turned = (first * cosines - second * sines, second * cosines + first * sines, rest)
        return torch.cat(turned, dim=-1)


class RotaryRows:
    """See `cupy_kernels.prompt_rows`."""

    def __init__(self, shape: AttentionShape, tensors: AttentionTensors, *, epsilon: float) -> None:
        self._heads = _Heads(shape, tensors, epsilon)

    def queue(self, qkv: int, queries: int, *, num_tokens: int, start: int, stream: int) -> None:
        shape, dtype = self._heads.shape, self._heads.dtype
        size = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        new = at(qkv, dtype, shape.batch, num_tokens, size)
        found = self._heads.take_up(new, slice(start, start + num_tokens)).transpose(1, 2)
        at(queries, dtype, *found.shape).copy_(found)


def decode_attention(
    shape: AttentionShape,
    tensors: AttentionTensors,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    epsilon: float = 0.0,
) -> Callable[[int], None]:
    """See `cupy_kernels.decode_attention`."""
    heads = _Heads(shape, tensors, epsilon)
    size = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    how: dict[str, Any] = {"scale": scale, "window": window}
    if shape.has_softcap:
        how["softcap"] = softcap

    def launch(stream: int) -> None:
        position = int(at(tensors.position, torch.int64, 1))
        qkv = at(tensors.qkv, heads.dtype, shape.batch, size, stride=tensors.qkv_stride)
        queries = heads.take_up(qkv[:, None], slice(position, position + 1))
        seen = slice(0, position + 1)
        made = attention(queries, heads.keys[:, :, seen], heads.values[:, :, seen], **how)
        out = at(
            tensors.out,
            heads.dtype,
            shape.batch,
            shape.heads * shape.head_dim,
            stride=tensors.out_stride,
        )
        out.copy_(made.transpose(1, 2).reshape(shape.batch, -1))

    return launch
