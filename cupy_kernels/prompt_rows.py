"""Launches norm_rows.cu, rotary_rows.cu and gated_rows.cu: a prompt beside its products.

Addresses as integers; kernels are only queued, on `stream`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cupy_kernels.decode_attention import HEAD_NORMS, AttentionShape, AttentionTensors
from cupy_kernels.launch import Launch, ceil_div, cuda_dtype
from cupy_kernels.linear_few import NORMS, Gate, Norm, NormWeight
from cupy_kernels.loader import load_kernel

if TYPE_CHECKING:
    import cupy

NORM_WARPS: Final = 8
ROTARY_WARPS: Final = 4
_GATED_THREADS: Final = 256
_OCTET: Final = 8


class _NormArguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class _GatedArguments(ctypes.Structure):
    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class _RotaryArguments(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("start", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """How many tokens, of how many values of what dtype (BF16 or F16)."""

    tokens: int
    columns: int
    dtype: str


def norm_rows(rows: Rows, kind: Norm, norm: NormWeight, x: int, out: int, stream: int) -> None:
    """The RMS norm of (tokens, columns) at `x`, to `out`."""
    kernel = _kernel(
        "norm_rows",
        ACTIVATION=cuda_dtype(rows.dtype),
        NORM=NORMS[kind],
        COLUMNS=rows.columns,
        WARPS=NORM_WARPS,
    )
    arguments = _NormArguments(x, norm.weight, out, norm.epsilon)
    Launch(kernel, (rows.tokens,), NORM_WARPS * 32, 0, arguments, overlap=False)(stream)


def gated_rows(rows: Rows, gate_kind: Gate, gate: int, up: int, out: int, stream: int) -> None:
    """act(gate) * up, (tokens, columns) each; `out` may be `gate`."""
    kernel = _kernel("gated_rows", ACTIVATION=cuda_dtype(rows.dtype), GATE=gate_kind.upper())
    count = rows.tokens * rows.columns
    arguments = _GatedArguments(gate, up, out, count)
    grid = (ceil_div(count, _GATED_THREADS * _OCTET),)
    Launch(kernel, grid, _GATED_THREADS, 0, arguments, overlap=False)(stream)


def rotary_rows(
    shape: AttentionShape,
    tensors: AttentionTensors,
    *,
    num_tokens: int,
    start: int,
    epsilon: float,
    stream: int,
) -> None:
    """Heads of `num_tokens` tokens a sequence, from position `start` on.

    `tensors.qkv` is (batch, tokens, (heads + 2 * kv_heads) * head_dim), contiguous; queries go to
    `tensors.out` (batch, heads, tokens, head_dim), keys and values into their caches.
    """
    kernel = _kernel(
        "rotary_rows",
        ACTIVATION=cuda_dtype(shape.dtype),
        HEAD_DIM=shape.head_dim,
        ROTARY_DIM=shape.rotary_dim,
        HEAD_NORM=HEAD_NORMS[shape.head_norm],
        WARPS=ROTARY_WARPS,
    )
    arguments = _RotaryArguments(
        qkv=tensors.qkv,
        cosines=tensors.cosines,
        sines=tensors.sines,
        queries=tensors.out,
        keys=tensors.keys,
        values=tensors.values,
        query_norm=tensors.query_norm or None,
        key_norm=tensors.key_norm or None,
        epsilon=epsilon,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        capacity=shape.capacity,
        start=start,
    )
    groups = ceil_div(shape.heads + 2 * shape.kv_heads, ROTARY_WARPS)
    grid = (num_tokens, groups, shape.batch)
    Launch(kernel, grid, ROTARY_WARPS * 32, 0, arguments, overlap=False)(stream)


def _kernel(name: str, **defines: str | int) -> cupy.RawKernel:
    import cupy

    return _kernel_on(name, tuple(defines.items()), cupy.cuda.Device().id)


@cache
def _kernel_on(name: str, defines: tuple[tuple[str, Any], ...], device: int) -> cupy.RawKernel:
    return load_kernel(name, **dict(defines))
