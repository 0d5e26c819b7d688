"""Launches embed.cu: rows of the embedding into the hidden state."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from cupy_kernels.launch import (
    OCTET,
    THREADS,
    Launch,
    ceil_div,
    check_aligned,
    cuda_dtype,
    current_gpu,
)
from cupy_kernels.loader import load_kernel


@dataclass(frozen=True, slots=True)
class EmbedTensors:
    """Addresses.

    Attributes:
        embedding: (vocabulary, hidden_size).
        tokens: int64 (batch,), each less than vocabulary.
        hidden: (batch, hidden_size), rows `hidden_stride` values apart.
    """

    embedding: int
    tokens: int
    hidden: int
    hidden_stride: int


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("embedding", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("hidden_size", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def embed(
    tensors: EmbedTensors,
    *,
    hidden_size: int,
    batch: int,
    dtype: str,
    scale: float = 1.0,
    overlap: bool = True,
) -> Launch:
    """A launch that can be queued again and again.

    Args:
        dtype: BF16 or F16.
        scale: what the row is multiplied by, as `dtype` holds it.
        overlap: begin while the launch before still runs, where the GPU can (see `Launch`).

    Raises:
        ValueError: a dtype or size that the kernel does not take, or rows that are not aligned.
    """
    if dtype not in ("BF16", "F16") or hidden_size % OCTET:
        raise ValueError(f"embed does not take rows of {hidden_size} {dtype} values")
    check_aligned(embedding=tensors.embedding, hidden=tensors.hidden)
    if tensors.hidden_stride % OCTET:
        raise ValueError(f"rows {tensors.hidden_stride} values apart are not aligned")
    arguments = _Arguments(
        embedding=tensors.embedding,
        tokens=tensors.tokens,
        hidden=tensors.hidden,
        stride=tensors.hidden_stride,
        hidden_size=hidden_size,
        scale=scale,
    )
    kernel = load_kernel("embed", ACTIVATION=cuda_dtype(dtype))
    grid = (ceil_div(hidden_size, THREADS * OCTET), batch)
    overlaps = overlap and current_gpu().can_overlap
    return Launch(kernel, grid, THREADS, 0, arguments, overlap=overlaps)
