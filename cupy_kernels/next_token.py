"""Launches next_token.cu: the likeliest token of each sequence, and on to the next step."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

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

_TILE: Final = THREADS * OCTET  # logits that a thread block looks at side by side, as in the .cu
_PARTS_AT: Final = 256  # bytes before the parts' results in the workspace


@dataclass(frozen=True, slots=True)
class NextTokenTensors:
    """Addresses.

    Attributes:
        logits: (batch, vocabulary), rows `logits_stride` values apart.
        ring: int64 (ring_size, batch); row step % ring_size gets the tokens.
        next_token: int64 (batch,).
        position, step: int64 () each, counted up by one.
        workspace: `workspace_bytes` bytes, zero before the first launch.
    """

    logits: int
    logits_stride: int
    ring: int
    next_token: int
    position: int
    step: int
    workspace: int


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("ring", ctypes.c_void_p),
        ("next_token", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("ring_size", ctypes.c_int),
    )


def workspace_bytes(vocabulary: int, batch: int) -> int:
    """What launches that do not run at the same time share, on the current device."""
    return _PARTS_AT + batch * _num_parts(vocabulary) * 8


def next_token(
    tensors: NextTokenTensors,
    *,
    vocabulary: int,
    batch: int,
    ring_size: int,
    dtype: str,
    overlap: bool = True,
) -> Launch:
    """A launch that can be queued again and again.

    Of equal logits the lowest index wins; a NaN wins only where there is nothing else.

    Args:
        dtype: of the logits, BF16, F16 or F32.
        overlap: begin while the launch before still runs, where the GPU can (see `Launch`).

    Raises:
        ValueError: an unknown dtype, no logits, or rows that are not aligned.
    """
    if vocabulary < 1 or batch < 1 or ring_size < 1:
        raise ValueError(f"{batch} sequences, {vocabulary} logits, a ring of {ring_size}")
    check_aligned(logits=tensors.logits, workspace=tensors.workspace)
    if tensors.logits_stride % OCTET and batch > 1:
        raise ValueError(f"rows {tensors.logits_stride} values apart are not aligned")
    arguments = _Arguments(
        logits=tensors.logits,
        stride=tensors.logits_stride,
        parts=tensors.workspace + _PARTS_AT,
        arrived=tensors.workspace,
        ring=tensors.ring,
        next_token=tensors.next_token,
        position=tensors.position,
        step=tensors.step,
        vocabulary=vocabulary,
        batch=batch,
        ring_size=ring_size,
    )
    kernel = load_kernel("next_token", LOGITS=cuda_dtype(dtype))
    grid = (_num_parts(vocabulary), batch)
    overlaps = overlap and current_gpu().can_overlap
    return Launch(kernel, grid, THREADS, 0, arguments, overlap=overlaps)


def _num_parts(vocabulary: int) -> int:
    """Thread blocks of a sequence."""
    return min(ceil_div(vocabulary, _TILE), current_gpu().multiprocessors)
