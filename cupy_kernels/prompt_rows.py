"""Launches norm_rows.cu, rotary_rows.cu and gated_rows.cu: a prompt beside its products.

Norms that are added belong to a step of one token as well.

Each is made once and queued again and again, by one thread at a time. Addresses are integers.
"""

from __future__ import annotations

import ctypes
from typing import Final

from cupy_kernels.decode_attention import HEAD_NORMS, AttentionShape, AttentionTensors
from cupy_kernels.launch import Launch, ceil_div, cuda_dtype
from cupy_kernels.linear_few import NORMS, Gate, Norm, NormWeight
from cupy_kernels.loader import load_kernel

_NORM_WARPS: Final = 8
_ROTARY_WARPS: Final = 4
_ROTARY_HEADS: Final = 4  # of a warp
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


class NormRows:
    """The RMS norm of rows of `columns` values of `dtype` (BF16 or F16).

    Args:
        added: to what is at `out`, instead of stored there.
    """

    def __init__(self, columns: int, dtype: str, kind: Norm, *, added: bool = False) -> None:
        defines = norm_defines(columns, dtype, kind, added=added)
        kernel = load_kernel("norm_rows", cooperative=False, **defines)
        arguments = _NormArguments()
        self._launch = Launch(kernel, (1,), _NORM_WARPS * 32, 0, arguments, overlap=True)

    def queue(self, num_rows: int, norm: NormWeight, x: int, out: int, stream: int) -> None:
        """Of (num_rows, columns) at `x`, to `out`; both 16-byte aligned."""
        arguments = self._launch.arguments
        arguments.x, arguments.out = x, out
        arguments.weight, arguments.epsilon = norm.weight, norm.epsilon
        self._launch.set_grid(num_rows)
        self._launch(stream)


def norm_defines(columns: int, dtype: str, kind: Norm, *, added: bool) -> dict[str, str | int]:
    """The macros of norm_rows.cu."""
    return {
        "ACTIVATION": cuda_dtype(dtype),
        "NORM": NORMS[kind],
        "COLUMNS": columns,
        "WARPS": _NORM_WARPS,
        "ADDED": int(added),
    }


class GatedRows:
    """act(gate) * up of values of `dtype` (BF16 or F16)."""

    def __init__(self, dtype: str, gate: Gate) -> None:
        kernel = load_kernel("gated_rows", ACTIVATION=cuda_dtype(dtype), GATE=gate.upper())
        self._launch = Launch(kernel, (1,), _GATED_THREADS, 0, _GatedArguments(), overlap=True)

    def queue(self, count: int, gate: int, up: int, out: int, stream: int) -> None:
        """Of `count` values, a multiple of 8; `out` may be `gate`."""
        arguments = self._launch.arguments
        arguments.gate, arguments.up, arguments.out, arguments.count = gate, up, out, count
        self._launch.set_grid(ceil_div(count, _GATED_THREADS * _OCTET))
        self._launch(stream)


class RotaryRows:
    """Heads of a prompt's tokens: norms, rotary embedding, keys and values into their caches.

    Args:
        tensors: `qkv` and `out` are not looked at.
        epsilon: of the heads' norms.
    """

    def __init__(self, shape: AttentionShape, tensors: AttentionTensors, *, epsilon: float) -> None:
        kernel = load_kernel("rotary_rows", cooperative=False, **rotary_defines(shape))
        arguments = _RotaryArguments(
            cosines=tensors.cosines,
            sines=tensors.sines,
            keys=tensors.keys,
            values=tensors.values,
            query_norm=tensors.query_norm or None,
            key_norm=tensors.key_norm or None,
            epsilon=epsilon,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            capacity=shape.capacity,
        )
        num_heads = shape.heads + 2 * shape.kv_heads
        self._groups = ceil_div(num_heads, _ROTARY_WARPS * _ROTARY_HEADS)
        self._batch = shape.batch
        self._launch = Launch(kernel, (1,), _ROTARY_WARPS * 32, 0, arguments, overlap=True)

    def queue(self, qkv: int, queries: int, *, num_tokens: int, start: int, stream: int) -> None:
        """Of `num_tokens` tokens a sequence, from position `start` on.

        Args:
            qkv: (batch, tokens, (heads + 2 * kv_heads) * head_dim), contiguous.
            queries: (batch, tokens, heads, head_dim), filled.
        """
        arguments = self._launch.arguments
        arguments.qkv, arguments.queries, arguments.start = qkv, queries, start
        self._launch.set_grid(num_tokens, self._groups, self._batch)
        self._launch(stream)


def rotary_defines(shape: AttentionShape) -> dict[str, str | int]:
    """The macros of rotary_rows.cu."""
    return {
        "ACTIVATION": cuda_dtype(shape.dtype),
        "HEAD_DIM": shape.head_dim,
        "ROTARY_DIM": shape.rotary_dim,
        "HEAD_NORM": HEAD_NORMS[shape.head_norm],
        "WARPS": _ROTARY_WARPS,
        "HEADS": _ROTARY_HEADS,
    }
