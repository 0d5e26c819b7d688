"""The reference against the published algorithms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.optim.reference import State, dequantize, quantize, update
from qtool.optim.rules import Hyperparameters, Scalars, scalars_of
from tests.optim.steps import blocks, moments, odd_gradient, random_state

SETTINGS = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.1)
COUNT = 5000


def plain_case(bits: int, algorithm: str) -> tuple[torch.Tensor, torch.Tensor, list[State]]:
    random = torch.Generator().manual_seed(2)
    values = torch.randn(COUNT, generator=random)
    gradient = torch.randn(COUNT, generator=random) * 1e-2
    return values, gradient, moments(random_state(COUNT, algorithm, bits, 3, odd=False))


@pytest.mark.parametrize("bits", [8, 32])
def test_adam_is_the_published_one(bits: int) -> None:
    """Loshchilov and Hutter, algorithm 2, from the moments that the codes stand for."""
    values, gradient, states = plain_case(bits, "adam")
    step = 4
    m, v = (dequantize(state).double() for state in states)
    p, g = values.double(), gradient.double()
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    corrected = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    expected = p - 1e-3 * (corrected + 0.1 * p)

    found, new = update("adam", scalars_of("adam", SETTINGS, step), values, gradient, states)
    assert torch.allclose(found.double(), expected, rtol=2e-7, atol=1e-9)
    assert_near(new[0], m)
    assert_near(new[1], v)


@pytest.mark.parametrize("bits", [8, 32])
def test_lion_is_the_published_one(bits: int) -> None:
    """Chen and others 2023, algorithm 2."""
    values, gradient, states = plain_case(bits, "lion")
    settings = Hyperparameters(1e-4, 0.9, 0.99, 0.0, 0.1)
    p, g, m = values.double(), gradient.double(), dequantize(states[0]).double()
    expected = p - 1e-4 * ((0.9 * m + 0.1 * g).sign() + 0.1 * p)
    found, new = update("lion", scalars_of("lion", settings, 4), values, gradient, states)
    assert torch.allclose(found.double(), expected, rtol=2e-7, atol=1e-9)
    assert_near(new[0], 0.99 * m + 0.01 * g)


def test_momentum_is_torchs() -> None:
    values, gradient, _ = plain_case(32, "momentum")
    parameter = torch.nn.Parameter(values.double())
    theirs = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    settings = Hyperparameters(0.1, 0.9, weight_decay=0.1)
    states = [State(torch.zeros(COUNT), None, True)]
    for step in range(1, 4):
        parameter.grad = gradient.double()
        theirs.step()
        scalars = scalars_of("momentum", settings, step)
        values, states = update("momentum", scalars, values, gradient, states)
    assert torch.allclose(values.double(), parameter.detach(), rtol=1e-6, atol=1e-7)


def assert_near(state: State, exact: torch.Tensor) -> None:
    """The state is the nearest code to the exact moment, or a float32 next to it."""
    found = dequantize(state).double()
    if state.absmax is None:
        assert torch.allclose(found, exact, rtol=1e-6, atol=1e-7 * exact.abs().max().item())
        return
    absmax = torch.nn.functional.pad(exact, (0, -COUNT % 256)).view(-1, 256).abs().amax(1)
    assert torch.allclose(state.absmax.double(), absmax, rtol=1e-6)
    from qtool.formats.codebooks import dynamic_map

    code = torch.tensor(dynamic_map(state.signed)).double()
    scale = absmax.repeat_interleave(256)[:COUNT]
    nearest = (exact[:, None] - code * scale[:, None]).abs().amin(1)
    assert bool(((found - exact).abs() <= nearest + 1e-6 * scale).all())


@pytest.mark.parametrize("algorithm", ["adam", "lion", "momentum"])
@pytest.mark.parametrize("bits", [8, 32])
def test_what_is_not_finite_is_left_alone(algorithm: str, bits: int) -> None:
    values = torch.ones(COUNT)
    gradient = odd_gradient(COUNT, torch.float32, 4)
    states = moments(random_state(COUNT, algorithm, bits, 5, odd=False))
    found, new = update(algorithm, scalars_of(algorithm, SETTINGS, 4), values, gradient, states)
    assert found.isfinite().all()
    assert found[5] == found[6] == 1 and found[7] != 1
    for state in new:
        moment = dequantize(state)
        assert moment.isfinite().all() and moment[5] == moment[6] == 0
        assert state.absmax is None or state.absmax.shape == (blocks(COUNT),)


def test_gradients_that_overflow_when_squared_are_not_finite() -> None:
    values, gradient = torch.ones(256), torch.full((256,), 1e-3)
    gradient[3] = 1e22
    states = [State(torch.zeros(256), None, True), State(torch.zeros(256), None, False)]
    found, new = update("adam", scalars_of("adam", SETTINGS, 1), values, gradient, states)
    assert found[3] == 1 and new[0].values[3] == new[1].values[3] == 0
    assert found[4] < 1


def test_zero_blocks_have_the_codes_of_zero() -> None:
    for signed, zero in ((True, 127), (False, 0)):
        state = quantize(torch.zeros(300), signed)
        assert state.values.eq(zero).all() and state.absmax is not None
        assert state.absmax.eq(0).all()
        tiny = quantize(torch.full((256,), 1e-31), signed)
        assert tiny.values.eq(zero).all() and tiny.absmax is not None and tiny.absmax[0] == 0


@pytest.mark.parametrize("absmax", [1e-30, 1e-6, 1.0, 2.0**20, 2.0**20 * 1.0001, 1e30, 3.4e38])
def test_codes_are_the_nearest_for_any_absmax(absmax: float) -> None:
    random = torch.Generator().manual_seed(6)
    moment = (torch.rand(4096, generator=random) * 2 - 1) * absmax
    moment[::256] = absmax
    state = quantize(moment, True)
    assert_near_codes(state, moment.double())


def assert_near_codes(state: State, exact: torch.Tensor) -> None:
    from qtool.formats.codebooks import dynamic_map

    assert state.absmax is not None
    scale = state.absmax.double().repeat_interleave(256)
    levels = torch.tensor(dynamic_map(True)).double() * scale[:, None]
    chosen = (exact - levels.gather(1, state.values.long()[:, None])[:, 0]).abs()
    assert bool((chosen <= (exact[:, None] - levels).abs().amin(1) + 1e-6 * scale).all())


def test_scalars_of_the_first_and_a_late_step() -> None:
    first = scalars_of("adam", SETTINGS, 1)
    assert first.step_size == pytest.approx(-1e-3 * math.sqrt(0.001) / 0.1, rel=1e-7)
    assert first.epsilon == pytest.approx(1e-8 * math.sqrt(0.001), rel=1e-7)
    late = scalars_of("adam", SETTINGS, 1_000_000)
    expected = Scalars(-1e-3, 1e-8, 1 - 1e-4, 0.9, 0.1, 0.999, 0.001)
    for found, wanted in zip(vars_of(late), vars_of(expected), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def vars_of(scalars: Scalars) -> list[float]:
    return [getattr(scalars, name) for name in scalars.__slots__]
