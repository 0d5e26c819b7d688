"""Numbers and functions of one value for kernels: inlined, so that loops over them are vectorized.

Everything is float32, operation by operation; `rounds` says whether to round to bfloat16 then.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload

from qtool.backends.cpu_kernels import inlined

INLINED: Final = {"forceinline": True}

u32, u16, f32 = np.uint32, np.uint16, np.float32

_LOG2_E = f32(1.4426950408889634)
_LN2_HIGH = f32(0.693359375)  # few bits: its products with small integers are exact
_LN2_LOW = f32(-2.12194440e-4)
_TO_INTEGER = f32(1.5 * 2**23)  # adding it leaves the rounded integer in the low bits
_TO_INTEGER_BITS = u32(_TO_INTEGER.view(np.uint32))
# Taylor's: |r| is at most ln 2 / 2, where the first term that is left out is below 6e-9.
_TERMS = tuple(f32(1 / math.factorial(n)) for n in range(7, 1, -1))


@inlined
def float_of(field: Any) -> Any:
    """The float32 whose bits an integer holds."""
    return u32(field).view(np.float32)


@inlined
def rounded(value: Any, rounds: Any) -> Any:
    """The nearest bfloat16, ties to even, if `rounds`."""
    bits = f32(value).view(np.uint32)
    odd = u32((bits >> u32(16)) & u32(1))
    nearest = u32(u32(bits + u32(0x7FFF) + odd) & u32(0xFFFF0000)).view(np.float32)
    return nearest if rounds and value == value else f32(value)


def as_kind(value: Any, array: Any) -> Any:
    """A float32 as what `array` holds: itself, or the bits of a bfloat16 that it is."""


@overload(as_kind, strict=False, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_as_kind(value: Any, array: Any) -> Any:
    if array.dtype == types.uint16:
        return lambda value, array: u16(f32(value).view(np.uint32) >> u32(16))
    return lambda value, array: value


def as_float(bits: Any) -> Any:
    """The value of a float32, or of a bfloat16's bits."""


@overload(as_float, strict=False, jit_options=INLINED)  # type: ignore[untyped-decorator]
def _overload_as_float(bits: Any) -> Any:
    if bits == types.uint16:
        return lambda bits: u32(u32(bits) << u32(16)).view(np.float32)
    return lambda bits: bits


@inlined
def exponential(x: Any) -> Any:
    """e^x, off by less than 2 units in the last place; 0 below -87, infinite from 89 on."""
    clamped = min(max(f32(x), f32(-88)), f32(89))
    shifted = f32(f32(clamped * _LOG2_E) + _TO_INTEGER)
    whole = f32(shifted - _TO_INTEGER)
    r = f32(f32(clamped - f32(whole * _LN2_HIGH)) - f32(whole * _LN2_LOW))
    p = f32(f32(_TERMS[0] * r) + _TERMS[1])
    p = f32(f32(p * r) + _TERMS[2])
    p = f32(f32(p * r) + _TERMS[3])
    p = f32(f32(p * r) + _TERMS[4])
    p = f32(f32(p * r) + _TERMS[5])
    p = f32(f32(f32(f32(p * r) * r) + r) + f32(1))
    power = u32(u32(shifted.view(np.uint32) - _TO_INTEGER_BITS) + u32(127)) << u32(23)
    found = f32(p * u32(power).view(np.float32))
    found = f32(0) if x < f32(-87) else found
    return f32(x) if x != x else found


@inlined
def hyperbolic_tangent(x: Any) -> Any:
    """Off by less than 2e-7."""
    return f32(f32(1) - f32(f32(2) / f32(f32(1) + exponential(f32(2) * x))))


@inlined
def silu(x: Any) -> Any:
    """x / (1 + e^-x)."""
    return f32(x / f32(f32(1) + exponential(-x)))


@inlined
def gelu_tanh(x: Any) -> Any:
    """x/2 (1 + tanh(u)), where 1 + tanh(u) is 2 / (1 + e^-2u)."""
    u = f32(0.7978845608028654) * f32(x + f32(f32(0.044715) * x) * x * x)
    return f32(x / f32(f32(1) + exponential(f32(-2) * u)))


@inlined
def gelu(x: Any) -> Any:
    """x/2 (1 + erf(x / sqrt(2)))."""
    return f32(f32(0.5) * x * f32(1 + math.erf(x * 0.7071067811865476)))
