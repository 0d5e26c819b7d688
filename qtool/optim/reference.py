"""The rules, for reading: one update of one tensor with plain operations of PyTorch.

With m and v from the states, g the gradient, b1 and b2 the betas, every line float32:

    Adam        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g g
                p = decay p - rate c2/c1 * m / (sqrt(v) + c2 epsilon)
    Lion        p = decay p - rate sign(b1 m + (1 - b1) g)
                m = b2 m + (1 - b2) g
    momentum    m = b1 m + (g + weight_decay p)
                p = p - rate m

decay is 1 - rate * weight_decay, c1 = 1 - b1^t and c2 = sqrt(1 - b2^t). p is rounded to its dtype
once, at the end. The update uses m and v before they are rounded to 8 bit; what is stored is the
nearest code, see `qtool.formats.optimizer_states`. A value whose m or v would not be finite keeps
its p, and its m and v become zero.

The order of operations is part of the rule: Numba's and CUDA's kernels give the same bits. A
product that is added to something is not rounded before (`_fused`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qtool.formats.codebooks import dynamic_map
from qtool.formats.optimizer_states import BLOCKSIZE, LARGE, LARGE_SCALE, SMALLEST, nearest_codes
from qtool.optim.rules import Algorithm, Scalars

SMALLEST_UNDER_ROOT: Final = float(SMALLEST)


class State(NamedTuple):
    """The first or second moment of a tensor, flat.

    Attributes:
        values: uint8 codes or float32, (n,).
        absmax: float32 (ceil(n/256),), beside codes.
        signed: a first moment.
    """

    values: Tensor
    absmax: Tensor | None
    signed: bool


def update(
    algorithm: Algorithm, scalars: Scalars, values: Tensor, gradient: Tensor, states: list[State]
) -> tuple[Tensor, list[State]]:
    """New values and states of a tensor; nothing is changed in place.

    Args:
        values: float32, bfloat16 or float16 (n,), as `gradient`.
        states: one, for Adam two.
    """
    p, g = values.float(), gradient.float()
    direction = g
    if algorithm == "momentum":
        g = _fused(p, scalars.epsilon, g)
        moments = [_decayed(states[0], scalars.beta1, g)]
    elif algorithm == "lion":
        direction = _decayed(states[0], scalars.beta1, g * scalars.keep1)
        moments = [_decayed(states[0], scalars.beta2, g * scalars.keep2)]
    else:
        moments = [
            _decayed(states[0], scalars.beta1, g * scalars.keep1),
            _decayed(states[1], scalars.beta2, g * scalars.keep2 * g),
        ]
    finite = torch.stack([moment.isfinite() for moment in moments]).all(0)
    moments = [torch.where(finite, moment, 0.0) for moment in moments]

    if algorithm == "momentum":
        new = _fused(moments[0], scalars.step_size, p)
    elif algorithm == "lion":
        new = _fused(p, scalars.decay, direction.sign() * scalars.step_size)
    else:
        # In float64, since PyTorch's float32 root is not correctly rounded everywhere.
        root = moments[1].clamp(min=SMALLEST_UNDER_ROOT).double().sqrt().float()
        step = moments[0] * (1 / (root + scalars.epsilon)) * scalars.step_size
        new = _fused(p, scalars.decay, step)
    new_values = torch.where(finite, new.to(values.dtype), values)
    return new_values, [_stored(m, old) for m, old in zip(moments, states, strict=True)]


def dequantize(state: State) -> Tensor:
    """float32 (n,)."""
    if state.absmax is None:
        return state.values
    code = torch.tensor(dynamic_map(state.signed), device=state.values.device)
    return code[state.values.long()] * _per_value(state.absmax, state.values.numel())


def quantize(moment: Tensor, signed: bool) -> State:
    """`moment` float32 (n,) in 8 bit."""
    blocks = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    scale = torch.where(absmax > float(LARGE), float(LARGE_SCALE), 1.0)
    is_zero = absmax < float(SMALLEST)
    inverse = torch.where(is_zero, 0.0, 1 / (absmax * scale))
    scaled = ((blocks * scale[:, None]) * inverse[:, None]).flatten()[: moment.numel()]
    codes = nearest_codes(scaled.cpu().numpy().astype(np.float32), signed)
    return State(
        torch.from_numpy(codes).to(moment.device), torch.where(is_zero, 0.0, absmax), signed
    )


def _decayed(state: State, factor: float, added: Tensor) -> Tensor:
    """state * factor + added; the factor of a block is rounded with its absmax."""
    if state.absmax is None:
        return _fused(state.values, factor, added)
    code = torch.tensor(dynamic_map(state.signed), device=added.device)
    factors = _per_value(state.absmax * factor, added.numel())
    return _fused(code[state.values.long()], factors, added)


def _stored(moment: Tensor, old: State) -> State:
    return quantize(moment, old.signed) if old.absmax is not None else old._replace(values=moment)


def _per_value(absmax: Tensor, count: int) -> Tensor:
    return absmax.repeat_interleave(BLOCKSIZE)[:count]


def _fused(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a * b + c rounded once, from float64; twice for about one number in a billion."""
    factor = b.double() if isinstance(b, Tensor) else b
    return (a.double() * factor + c.double()).float()
