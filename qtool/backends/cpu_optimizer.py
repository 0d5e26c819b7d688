"""Numba kernels of optimizers: one update of a tensor; the rules are in `qtool.optim.reference`.

    update = update_kernel("adam", np.uint16, np.uint8)
    update(values, gradient, state1, state2, absmax1, absmax2, count, scalars, first, last)

As in `cpu_kernels` values come as their bits, arrays as addresses, and nothing is checked. The
work goes block by block through small buffers, in loops that LLVM vectorizes. Results are the same
to the bit as CUDA's. The cache on disk looks at this file only, see `cpu_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from qtool.backends.cpu_kernels import _narrow, _widen_float16, helper, kernel
from qtool.backends.cpu_vectors import array_at
from qtool.formats.codebooks import dynamic_map
from qtool.formats.optimizer_states import (
    BLOCKSIZE,
    LARGE,
    LARGE_SCALE,
    SMALLEST,
    ZERO_CODE,
    slot_table,
)

Algorithm = Literal["adam", "lion", "momentum"]

# The places of `scalars`, in the order of `qtool.optim.rules.Scalars`.
STEP_SIZE, EPSILON, DECAY, BETA1, KEEP1, BETA2, KEEP2 = range(7)

_SIGNED_MAP: Final = dynamic_map(signed=True)
_UNSIGNED_MAP: Final = dynamic_map(signed=False)
_SIGNED_SLOTS: Final = slot_table(signed=True)
_UNSIGNED_SLOTS: Final = slot_table(signed=False)
_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_INFINITY_BITS = np.uint32(0x7F800000)
# Slots are those of a value times 2^-103, which is taken off the exponent instead: arithmetic with
# subnormal numbers is slow.
_SLOT_SHIFT_BITS = np.uint32(103 << 23)
_LEAST_BITS = np.uint32((127 - 24) << 23)

u64, u32, u8, f32 = np.uint64, np.uint32, np.uint8, np.float32


@cache
def update_kernel(algorithm: Algorithm, value_type: Any, state_type: Any) -> Callable[..., None]:
    """The kernel for values of np.uint16 (BF16), np.int16 (F16) or np.uint32 (F32).

    States are codes, np.uint8, or np.float32. Its arguments, the large ones as addresses:

        values, gradient: (count,).
        state1, state2: (count,); the second one is of Adam alone.
        absmax1, absmax2: float32 (ceil(count/256),), beside codes.
        count: values of the tensor.
        scalars: float32 (7,), an array.
        first_block, last_block: the blocks [first_block, last_block) of the tensor.
    """
    update_moments, step = _moments_and_step(algorithm)
    is_adam = algorithm == "adam"

    @kernel
    def update(
        values_at: int,
        gradient_at: int,
        state1_at: int,
        state2_at: int,
        absmax1_at: int,
        absmax2_at: int,
        count: int,
        scalars: Any,
        first_block: int,
        last_block: int,
    ) -> None:
        values, gradient = array_at(values_at, value_type), array_at(gradient_at, value_type)
        state1, state2 = array_at(state1_at, state_type), array_at(state2_at, state_type)
        absmax1, absmax2 = array_at(absmax1_at, f32), array_at(absmax2_at, f32)
        # Of a block; what is behind the end of the tensor has no part in absmax.
        buffers = np.zeros((4, BLOCKSIZE), f32)
        p, g, m, v = buffers[0], buffers[1], buffers[2], buffers[3]
        is_bad = np.zeros(BLOCKSIZE, np.bool_)
        for block in range(u64(first_block), u64(last_block)):
            first = block * u64(BLOCKSIZE)
            size = min(u64(count) - first, u64(BLOCKSIZE))
            if size < u64(BLOCKSIZE):
                buffers[:] = 0
            for j in range(size):
                p[j] = _widen(values[first + j])
                g[j] = _widen(gradient[first + j])
            scale1 = _read_state(state1, _SIGNED_MAP, absmax1, block, size, m)
            scale2 = scale1
            if is_adam:
                scale2 = _read_state(state2, _UNSIGNED_MAP, absmax2, block, size, v)
            update_moments(scalars, scale1, scale2, p, g, m, v)
            any_bad = max(_largest(m), _largest(v)) >= _INFINITY_BITS
            if any_bad:
                _drop_bad(m, v, is_bad)
            step(scalars, p, g, m, v)
            if any_bad:
                for j in range(size):
                    if is_bad[j]:
                        p[j] = _widen(values[first + j])
            for j in range(size):
                values[first + j] = _narrow(p[j], values)
            _write_state(m, _SIGNED_SLOTS, state1, absmax1, block, size)
            if is_adam:
                _write_state(v, _UNSIGNED_SLOTS, state2, absmax2, block, size)

    return update


# ---- The algorithms ---------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _fused(typing: Any, a: Any, b: Any, c: Any) -> tuple[Any, Callable[..., Any]]:
    """a * b + c of float32, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        function = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        callee = cgutils.get_or_insert_function(builder.module, function, "llvm.fma.f32")
        return builder.call(callee, operands)

    return types.float32(types.float32, types.float32, types.float32), emit


def _moments_and_step(algorithm: Algorithm) -> tuple[Callable[..., None], Callable[..., None]]:
    """What computes the new m, v from p, g, m, v, and then the new p; `scale` is of the states."""

    @helper
    def adam_moments(s: Any, scale1: Any, scale2: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        decay1, decay2 = scale1 * s[BETA1], scale2 * s[BETA2]
        keep1, keep2 = s[KEEP1], s[KEEP2]
        for j in range(BLOCKSIZE):
            m[j] = _fused(m[j], decay1, f32(g[j] * keep1))
            v[j] = _fused(v[j], decay2, f32(f32(g[j] * keep2) * g[j]))

    @helper
    def adam_step(s: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        step_size, epsilon, decay = s[STEP_SIZE], s[EPSILON], s[DECAY]
        for j in range(BLOCKSIZE):
            spread = f32(np.sqrt(max(v[j], SMALLEST)) + epsilon)
            p[j] = _fused(p[j], decay, f32(f32(m[j] * f32(f32(1) / spread)) * step_size))

    @helper
    def lion_moments(s: Any, scale1: Any, scale2: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        decay1, decay2 = scale1 * s[BETA1], scale1 * s[BETA2]
        keep1, keep2 = s[KEEP1], s[KEEP2]
        for j in range(BLOCKSIZE):
            direction = _fused(m[j], decay1, f32(g[j] * keep1))
            m[j] = _fused(m[j], decay2, f32(g[j] * keep2))
            g[j] = direction

    @helper
    def lion_step(s: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        step_size, decay = s[STEP_SIZE], s[DECAY]
        for j in range(BLOCKSIZE):
            step = step_size if g[j] > 0 else -step_size if g[j] < 0 else f32(0)
            p[j] = _fused(p[j], decay, step)

    @helper
    def momentum_moments(s: Any, scale1: Any, scale2: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        decay1, weight_decay = scale1 * s[BETA1], s[EPSILON]
        for j in range(BLOCKSIZE):
            m[j] = _fused(m[j], decay1, _fused(p[j], weight_decay, g[j]))

    @helper
    def momentum_step(s: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        step_size = s[STEP_SIZE]
        for j in range(BLOCKSIZE):
            p[j] = _fused(m[j], step_size, p[j])

    if algorithm == "adam":
        return adam_moments, adam_step
    if algorithm == "lion":
        return lion_moments, lion_step
    return momentum_moments, momentum_step


@helper
def _largest(moment: Any) -> Any:
    """The bits of the largest magnitude of a block; those of NaN are above infinity's."""
    bits, found = moment.view(np.uint32), u32(0)
    for j in range(BLOCKSIZE):
        found = max(found, bits[j] & _MAGNITUDE_BITS)
    return found


@helper
def _drop_bad(m: Any, v: Any, is_bad: Any) -> None:
    """Zero the moments that are not finite, both of a value, and say which they are."""
    for j in range(BLOCKSIZE):
        is_bad[j] = not (abs(m[j]) < np.inf and abs(v[j]) < np.inf)
        if is_bad[j]:
            m[j] = v[j] = 0


# ---- States -----------------------------------------------------------------------------------


def _read_state(state: Any, code: Any, absmax: Any, block: Any, size: Any, moment: Any) -> Any:
    """Fill `moment`, of a block, with what a scale is to be multiplied with; returns the scale."""


@overload(_read_state)  # type: ignore[untyped-decorator]
def _overload_read_state(
    state: Any, code: Any, absmax: Any, block: Any, size: Any, moment: Any
) -> Callable[..., Any]:
    return _read_codes if state.dtype == types.uint8 else _read_floats


def _read_codes(state: Any, code: Any, absmax: Any, block: Any, size: Any, moment: Any) -> Any:
    first = block * u64(BLOCKSIZE)
    for j in range(size):
        moment[j] = code[state[first + j]]
    return absmax[block]


def _read_floats(state: Any, code: Any, absmax: Any, block: Any, size: Any, moment: Any) -> Any:
    first = block * u64(BLOCKSIZE)
    for j in range(size):
        moment[j] = state[first + j]
    return f32(1)


def _write_state(moment: Any, slots: Any, state: Any, absmax: Any, block: Any, size: Any) -> None:
    """The inverse: `slots` is the table of the code that `moment` is read with."""


@overload(_write_state)  # type: ignore[untyped-decorator]
def _overload_write_state(
    moment: Any, slots: Any, state: Any, absmax: Any, block: Any, size: Any
) -> Callable[..., None]:
    return _write_codes if state.dtype == types.uint8 else _write_floats


def _write_codes(moment: Any, slots: Any, state: Any, absmax: Any, block: Any, size: Any) -> None:
    largest = u32(_largest(moment)).view(np.float32)
    scale = LARGE_SCALE if largest > LARGE else f32(1)
    inverse = f32(0)
    if largest < SMALLEST:
        largest = f32(0)
    else:
        inverse = f32(1) / f32(largest * scale)
    absmax[block] = largest
    first = block * u64(BLOCKSIZE)
    for j in range(size):
        scaled = f32(f32(moment[j] * scale) * inverse).view(np.uint32)
        bits = max(scaled & _MAGNITUDE_BITS, _LEAST_BITS) - _SLOT_SHIFT_BITS
        code = u32(slots[bits >> u32(16)] + bits) >> u32(16)
        mirrored = u32(2 * ZERO_CODE) - min(code, u32(2 * ZERO_CODE))
        negative = u32(0) - (scaled >> u32(31))  # all ones: no branch, which would be a guess
        state[first + j] = u8((code & ~negative) | (mirrored & negative))


def _write_floats(moment: Any, slots: Any, state: Any, absmax: Any, block: Any, size: Any) -> None:
    first = block * u64(BLOCKSIZE)
    for j in range(size):
        state[first + j] = moment[j]


# ---- Values -----------------------------------------------------------------------------------


def _widen(bits: Any) -> Any:
    """The float32 behind `bits`."""


@overload(_widen)  # type: ignore[untyped-decorator]
def _overload_widen(bits: Any) -> Callable[[Any], Any] | None:
    versions = {
        types.uint16: _widen_bfloat16,
        types.int16: _widen_any_float16,
        types.uint32: _widen_float32,
    }
    return versions.get(bits)


def _widen_bfloat16(bits: Any) -> Any:
    return u32(u32(bits) << u32(16)).view(np.float32)


def _widen_float32(bits: Any) -> Any:
    return u32(bits).view(np.float32)


_widen_finite_float16 = helper(_widen_float16)


def _widen_any_float16(bits: Any) -> Any:
    """Infinity and NaN, which the kernels of weights never meet, have the largest exponent."""
    finite = u32(f32(_widen_finite_float16(bits)).view(np.uint32))
    beyond = u32(112 << 23) if (u32(bits) & u32(0x7C00)) == u32(0x7C00) else u32(0)
    return u32(finite + beyond).view(np.float32)
