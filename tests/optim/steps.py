"""Tensors with everything that can happen in them, and steps by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.formats.optimizer_states import BLOCKSIZE
from qtool.optim import EightBitOptimizer
from qtool.optim.reference import State, update
from qtool.optim.rules import scalars_of
from qtool.optim.states import NUM_STATES, ParameterState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blocks(count: int) -> int:
    return -(-count // BLOCKSIZE)


def odd_gradient(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of many magnitudes; from 700 values on with zeros, NaN, infinity, tiny and huge ones."""
    random = torch.Generator().manual_seed(seed)
    spread = 10 ** (torch.rand(count, generator=random) * 4 - 4)
    gradient = (torch.randn(count, generator=random) * spread).to(dtype)
    if count > 700:
        gradient[5], gradient[6] = torch.nan, -torch.inf
        gradient[256:512] = 0
    if count > 2000 and dtype != torch.float16:
        gradient[1024:1280] *= 1e10
        gradient[1290], gradient[1300:1310] = 1e-18, 1e22
    return gradient


def random_state(
    count: int, algorithm: Any, bits: int, seed: int, *, odd: bool = True
) -> ParameterState:
    """Codes of any value and absmax of any magnitude, or float32; after 3 steps."""
    random = torch.Generator().manual_seed(seed)
    state: ParameterState = {"step": torch.tensor(3)}
    for i in range(1, NUM_STATES[algorithm] + 1):
        if bits == 32:
            moment = torch.randn(count, generator=random) * 1e-3
            state[f"state{i}"] = moment if i == 1 else moment.square()
            continue
        codes = torch.randint(0, 256, (count,), generator=random)
        state[f"state{i}"] = codes.to(torch.uint8)
        absmax = torch.rand(blocks(count), generator=random) * (1e-3 if i == 1 else 1e-6)
        if odd:
            absmax[::3] = 0
            absmax[4:8] = torch.tensor([1e-31, 1e9, 1e20, 1e-38])[: absmax[4:8].numel()]
        state[f"absmax{i}"] = absmax
    return state


def moments(state: ParameterState) -> list[State]:
    return [
        State(state[f"state{i}"].flatten(), state.get(f"absmax{i}"), i == 1)
        for i in (1, 2)
        if f"state{i}" in state
    ]


def reference_step(optimizer: EightBitOptimizer) -> list[tuple[Tensor, Tensor, ParameterState]]:
    """What `optimizer.step()` has to make of its parameters: each with its new value and state.

    For contiguous parameters that all have a state, and of which some have a gradient.
    """
    expected = []
    for group in optimizer.param_groups:
        settings = optimizer._settings(group)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.grad is None:
                expected.append((parameter, parameter.detach().clone(), dict(state)))
                continue
            step = int(state["step"]) + 1
            values, states = update(
                optimizer.algorithm,
                scalars_of(optimizer.algorithm, settings, step),
                parameter.detach().flatten(),
                parameter.grad.flatten(),
                moments(state),
            )
            new: ParameterState = {"step": torch.tensor(step, device=parameter.device)}
            for i, moment in enumerate(states, 1):
                new[f"state{i}"] = moment.values.view(parameter.shape)
                if moment.absmax is not None:
                    new[f"absmax{i}"] = moment.absmax
            expected.append((parameter, values.view(parameter.shape), new))
    return expected


def assert_same(
    optimizer: EightBitOptimizer, expected: Sequence[tuple[Tensor, Tensor, ParameterState]]
) -> None:
    for parameter, values, state in expected:
        assert_equal_bits(parameter.detach(), values, "values")
        found = optimizer.state[parameter]
        assert set(found) == set(state)
        for name, tensor in state.items():
            assert_equal_bits(found[name], tensor, name)


def assert_equal_bits(found: Tensor, expected: Tensor, what: str) -> None:
    same = found == expected
    if found.is_floating_point():
        same |= found.isnan() & expected.isnan()
    if not bool(same.all()):
        wrong = (~same).flatten().nonzero().flatten()[:5]
        pairs = [
            f"[{i}] {found.flatten()[i].item()!r}, expected {expected.flatten()[i].item()!r}"
            for i in wrong.tolist()
        ]
        count = int((~same).sum())
        raise AssertionError(
            f"{what} of shape {tuple(found.shape)}: {count} differ: {'; '.join(pairs)}"
        )


def with_states(
    optimizer: EightBitOptimizer, states: Sequence[ParameterState]
) -> EightBitOptimizer:
    """Load `states` (flat) for all parameters, in their order."""
    saved = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {
        number: {
            name: tensor.view(parameter.shape) if name in ("state1", "state2") else tensor
            for name, tensor in state.items()
        }
        for number, (parameter, state) in enumerate(zip(parameters, states, strict=True))
    }
    optimizer.load_state_dict(saved)
    return optimizer
