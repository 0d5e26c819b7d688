"""Launches adapter_inner.cu: the inner values of LoRA adapters, of up to eight tokens."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from cupy_kernels.launch import Launch, cuda_dtype
from cupy_kernels.linear_few import (
    MAX_TOKENS,
    NORMS,
    RANK_MULTIPLE,
    Norm,
    NormWeight,
    Tokens,
)
from cupy_kernels.loader import load_kernel

# Rows of this many columns stay in the registers of eight warps.
MAX_COLUMNS_OF_8_WARPS: Final = 16_384
# Up to which each row has a thread block of its own; with more, blocks share what they read of x.
MAX_LONE_ROWS: Final = 256
SHARED_ROWS: Final = 2


@dataclass(frozen=True, slots=True)
class InnerKind:
    """What a kernel is made for.

    Attributes:
        columns: of x; a multiple of 64.
        rows: of A; a multiple of 8.
        dtype: of x and A, BF16 or F16.
        norm: taken of x before.
    """

    columns: int
    rows: int
    dtype: str
    norm: Norm = "none"


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("norm_weight", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("x_is_there", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("num_rows", ctypes.c_int),
        ("num_tokens", ctypes.c_int),
    )


class AdapterInner:
    """inner = scales * (A @ x), for the adapters of all layers that share x.

    The product behind may begin with x before this launch has ended, which says so in `x_is_there`
    once the launches before have. Somebody else sets that to 0 beforehand.

    Args:
        a: (rows, columns) as an address, 16-byte aligned.
        scales: float32 (rows,).
        x_is_there: int32 () that is set to 1, as an address; 0 for none.
        overlap: begin while the launch before still runs (see `Launch`).

    Raises:
        ValueError: more tokens than 8, or sizes that do not fit.
    """

    def __init__(
        self,
        kind: InnerKind,
        *,
        a: int,
        scales: int,
        max_tokens: int,
        norm: NormWeight | None = None,
        x_is_there: int = 0,
        overlap: bool = True,
    ) -> None:
        _check(kind, max_tokens, norm)
        defines = specialise(kind, max_tokens)
        arguments = _Arguments(
            a=a,
            scales=scales,
            x_is_there=x_is_there or None,
            num_rows=kind.rows,
        )
        if norm is not None:
            arguments.norm_weight, arguments.epsilon = norm.weight, norm.epsilon
        rows, warps = int(defines["ROWS"]), int(defines["WARPS"])
        self._launch = Launch(
            load_kernel("adapter_inner", cooperative=False, **defines),
            (kind.rows // rows,),
            warps * 32,
            0,
            arguments,
            overlap=overlap,
        )
        self._max_tokens = max_tokens

    def queue(self, tokens: Tokens, stream: int) -> None:
        """Queue it for the activations of `tokens`, of which nothing but those is read.

        `tokens.inner` is filled: float32 (count, rows).

        Raises:
            ValueError: more tokens than the launch was made for.
        """
        if not 0 < tokens.count <= self._max_tokens:
            raise ValueError(f"{tokens.count} tokens, the launch takes {self._max_tokens}")
        arguments = self._launch.arguments
        arguments.x, arguments.x_stride = tokens.x, tokens.x_stride
        arguments.inner, arguments.num_tokens = tokens.inner, tokens.count
        self._launch(stream)


def specialise(kind: InnerKind, max_tokens: int) -> dict[str, str | int]:
    """The macros."""
    return {
        "ACTIVATION": cuda_dtype(kind.dtype),
        "TOKENS": 1 << (max_tokens - 1).bit_length(),
        "NORM": NORMS[kind.norm],
        "COLUMNS": kind.columns,
        "WARPS": 8 if kind.columns <= MAX_COLUMNS_OF_8_WARPS else 16,
        "ROWS": 1 if kind.rows <= MAX_LONE_ROWS else SHARED_ROWS,
    }


def _check(kind: InnerKind, max_tokens: int, norm: NormWeight | None) -> None:
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"{max_tokens} tokens, the kernel takes 1 to {MAX_TOKENS}")
    if kind.rows % RANK_MULTIPLE or kind.columns % RANK_MULTIPLE or not kind.rows:
        raise ValueError(f"A is {kind.rows} x {kind.columns}, no multiples of {RANK_MULTIPLE}")
    if (norm is None) != (kind.norm == "none"):
        raise ValueError(f"the norm is {kind.norm}, its weight {norm}")
