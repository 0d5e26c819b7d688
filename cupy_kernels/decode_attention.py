"""Launches decode_attention.cu: rotary embedding, cache update and attention of one new token."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from cupy_kernels.launch import (
    OCTET,
    Launch,
    ceil_div,
    check_aligned,
    cuda_dtype,
    num_multiprocessors,
)
from cupy_kernels.loader import load_kernel

LARGEST_HEAD_DIM: Final = 256
LARGEST_GROUP: Final = 16
HEAD_NORMS: Final = {"none": 0, "rms": 1, "rms_plus_one": 2}  # as in rotary_heads.cuh
_WARPS: Final = 8
_MOST_HEADS: Final = 4  # of a thread block: what registers hold without spilling
_MOST_SPLITS: Final = 64  # more strips take the last block longer than they save the others


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all layers of a model share.

    Attributes:
        rotary_dim: leading dimensions of a head that are turned.
        head_norm: none, rms, or rms_plus_one, of query and key heads.
        has_softcap: scores go through cap * tanh(score / cap).
        capacity: tokens that the caches hold.
        dtype: BF16 or F16.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    head_norm: str
    has_softcap: bool
    batch: int
    capacity: int
    dtype: str

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Addresses; 0 where there is none.

    Attributes:
        qkv: (batch, (heads + 2 * kv_heads) * head_dim), rows `qkv_stride` values apart: heads of
            queries, keys and values, before norm and rotary embedding.
        cosines, sines: float32 (capacity, rotary_dim / 2).
        position: int64 (), where the new token goes; read on the device.
        keys, values: (batch, kv_heads, capacity, head_dim); the new token's are written.
        out: (batch, heads * head_dim), rows `out_stride` values apart.
        workspace: `workspace_bytes` bytes, zero before the first launch.
        query_norm, key_norm: (head_dim,).
        sinks: float32 (heads,), scores that take weight and give no value.
    """

    qkv: int
    qkv_stride: int
    cosines: int
    sines: int
    position: int
    keys: int
    values: int
    out: int
    out_stride: int
    workspace: int
    query_norm: int = 0
    key_norm: int = 0
    sinks: int = 0


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("results", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
    )


def why_not(shape: AttentionShape) -> str | None:
    """What the kernel does not do of `shape`; None if it does all."""
    if shape.heads % shape.kv_heads or shape.group > LARGEST_GROUP:
        return f"{shape.heads} query heads for {shape.kv_heads} key heads"
    if shape.head_dim % 16 or shape.head_dim > LARGEST_HEAD_DIM:
        return f"heads of {shape.head_dim} dimensions"
    if shape.rotary_dim % 2 or not 0 < shape.rotary_dim <= shape.head_dim:
        return f"a rotary embedding of {shape.rotary_dim} dimensions"
    return None


def workspace_bytes(shape: AttentionShape) -> int:
    """What launches that do not run at the same time share, on the current device."""
    split = split_work(shape, num_multiprocessors())
    return _counters_bytes(split) + _results_bytes(shape, split)


def decode_attention(
    shape: AttentionShape,
    tensors: AttentionTensors,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    epsilon: float = 0.0,
    overlap: bool = True,
) -> Launch:
    """A launch that can be queued again and again.

    Args:
        window: tokens that are visible, the new one among them; 0 for all.
        epsilon: of the head norms.
        overlap: begin while the launch before still runs (see `Launch`).

    Raises:
        ValueError: a shape that the kernel does not take, or an address that is not aligned.
    """
    reason = why_not(shape)
    if reason is not None:
        raise ValueError(f"decode_attention does not take {reason}")
    check_aligned(
        qkv=tensors.qkv, keys=tensors.keys, values=tensors.values, workspace=tensors.workspace
    )
    if tensors.qkv_stride % OCTET:
        raise ValueError(f"rows {tensors.qkv_stride} values apart are not aligned")
    split = split_work(shape, num_multiprocessors())
    arguments = _fill(shape, tensors, _counters_bytes(split))
    arguments.epsilon, arguments.scale, arguments.softcap = epsilon, scale, softcap
    arguments.window = window
    kernel = load_kernel("decode_attention", cooperative=False, **defines(shape))
    grid = (split.blocks, split.splits)
    return Launch(kernel, grid, _WARPS * 32, 0, arguments, overlap=overlap)


# -- how a kernel is specialised, and its work split ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Thread blocks for the same tokens, strips of tokens at most, query heads of a block."""

    blocks: int
    splits: int
    heads: int


def split_work(shape: AttentionShape, multiprocessors: int) -> Split:
    """Strips enough to occupy the GPU, but no more than there can be."""
    parts = ceil_div(shape.group, _MOST_HEADS)
    blocks = shape.batch * shape.kv_heads * parts
    most = min(_MOST_SPLITS, ceil_div(max(shape.capacity, 1), _least_strip(shape.head_dim)))
    splits = max(1, min(multiprocessors // blocks, most))
    return Split(blocks, splits, ceil_div(shape.group, parts))


def defines(shape: AttentionShape) -> dict[str, str | int]:
    """The macros of decode_attention.cu."""
    return {
        "ACTIVATION": cuda_dtype(shape.dtype),
        "HEAD_DIM": shape.head_dim,
        "ROTARY_DIM": shape.rotary_dim,
        "GROUP": shape.group,
        "HEADS": ceil_div(shape.group, ceil_div(shape.group, _MOST_HEADS)),
        "HEAD_NORM": HEAD_NORMS[shape.head_norm],
        "SOFTCAP": int(shape.has_softcap),
        "WARPS": _WARPS,
        "UNROLL": _unroll(shape.head_dim),
    }


def _unroll(head_dim: int) -> int:
    """Keys that a lane loads at once; large heads leave a warp one key at a time."""
    return 4 if head_dim > 128 else 2


def _least_strip(head_dim: int) -> int:
    """Tokens that a thread block looks at side by side, as in the .cu."""
    octets = head_dim // OCTET
    key_lanes = max(2, 1 << (octets - 1).bit_length())
    return _WARPS * (32 // key_lanes) * _unroll(head_dim)


def _fill(shape: AttentionShape, tensors: AttentionTensors, counters_bytes: int) -> _Arguments:
    return _Arguments(
        qkv=tensors.qkv,
        qkv_stride=tensors.qkv_stride,
        cosines=tensors.cosines,
        sines=tensors.sines,
        position=tensors.position,
        keys=tensors.keys,
        values=tensors.values,
        out=tensors.out,
        out_stride=tensors.out_stride,
        arrived=tensors.workspace,
        results=tensors.workspace + counters_bytes,
        query_norm=tensors.query_norm or None,
        key_norm=tensors.key_norm or None,
        sinks=tensors.sinks or None,
        capacity=shape.capacity,
        kv_heads=shape.kv_heads,
    )


def _counters_bytes(split: Split) -> int:
    return ceil_div(split.blocks * 4, 256) * 256


def _results_bytes(shape: AttentionShape, split: Split) -> int:
    return split.blocks * split.splits * split.heads * (shape.head_dim + 2) * 4
