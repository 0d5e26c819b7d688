"""On an NVIDIA GPU: the reference's bits, CUDA graphs, paged states, nothing that waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.optim import (
    Adam8bit,
    AdamW8bit,
    EightBitOptimizer,
    Lion8bit,
    PagedAdamW8bit,
    PagedLion8bit,
    SGD8bit,
    keep_32bit,
)
from qtool.optim.states import SMALLEST_PAGED
from tests.optim.steps import (
    DTYPES,
    assert_same,
    odd_gradient,
    random_state,
    reference_step,
    with_states,
)

pytestmark = pytest.mark.gpu

CLASSES: list[type[EightBitOptimizer]] = [AdamW8bit, Lion8bit, SGD8bit]
COUNTS = (4096, 5000, 300, 1, 70_001, 8192, 4097, 256)


def parameters(dtype: torch.dtype, counts: tuple[int, ...] = COUNTS) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(count, generator=random).to("cuda", dtype)) for count in counts
    ]


def give_gradients(tensors: list[nn.Parameter], seed: int) -> None:
    for i, parameter in enumerate(tensors):
        gradient = odd_gradient(parameter.numel(), parameter.dtype, 100 * seed + i)
        parameter.grad = gradient.to("cuda")


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_step_from_any_state_is_the_references(
    kind: type[EightBitOptimizer], dtype: torch.dtype, bits: int
) -> None:
    tensors = parameters(dtype)
    states = [random_state(p.numel(), kind.algorithm, bits, i) for i, p in enumerate(tensors)]
    half = len(tensors) // 2
    groups: list[dict[str, Any]] = [
        {"params": tensors[:half], "lr": 1e-2},
        {"params": tensors[half:], "weight_decay": 0.1},
    ]
    optimizer = with_states(kind(groups, lr=1e-3), states)
    for seed in range(3):
        give_gradients(tensors, seed)
        if seed == 1:
            tensors[1].grad = tensors[4].grad = None
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)


def test_many_tensors_and_groups() -> None:
    """More than a warp looks for at once, more words than a launch carries, more groups too."""
    tensors = parameters(torch.float32, tuple(4096 + i for i in range(700)))
    groups: list[dict[str, Any]] = [
        {"params": tensors[i : i + 7], "lr": 1e-3 * (1 + i)} for i in range(0, 700, 7)
    ]
    optimizer = AdamW8bit(groups)
    give_gradients(tensors, 0)
    optimizer.step()
    for seed in (1, 2):
        give_gradients(tensors, seed)
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)


def test_values_that_do_not_begin_at_whole_words() -> None:
    memory = torch.randn(20_000, device="cuda").bfloat16()
    tensors = [nn.Parameter(memory[1:6001]), nn.Parameter(memory[8003:14_003])]
    optimizer = AdamW8bit(tensors)
    for seed in range(2):
        for parameter in tensors:
            gradient = torch.randn(6003, device="cuda").bfloat16()
            parameter.grad = gradient[3:] if parameter is tensors[0] else gradient[:6000]
        if seed:
            expected = reference_step(optimizer)
        optimizer.step()
    assert_same(optimizer, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_captured_step_counts_and_takes_the_learning_rate_of_the_moment(
    kind: type[EightBitOptimizer],
) -> None:
    tensors, twins = parameters(torch.bfloat16), parameters(torch.bfloat16)
    for some in (tensors, twins):
        give_gradients(some, 0)
    rate, twin_rate = (torch.tensor(1e-2, device="cuda") for _ in range(2))
    optimizer, eager = kind(tensors, lr=rate), kind(twins, lr=twin_rate)
    optimizer.step()
    eager.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for i in range(3):
        for one, other in zip(tensors, twins, strict=True):
            assert one.grad is not None and other.grad is not None
            one.grad.mul_(0.9)
            other.grad.mul_(0.9)
        rate.mul_(0.5)
        twin_rate.mul_(0.5)
        graph.replay()
        eager.step()
        if i == 1:  # steps between replays, with gradients elsewhere
            kept = [parameter.grad for parameter in tensors]
            for some, stepper in ((tensors, optimizer), (twins, eager)):
                give_gradients(some, 7)
                stepper.step()
            for one, other, gradient in zip(tensors, twins, kept, strict=True):
                one.grad = gradient
                assert gradient is not None and other.grad is not None
                other.grad.copy_(gradient)
    assert_same(
        eager, [(q, p.detach(), optimizer.state[p]) for p, q in zip(tensors, twins, strict=True)]
    )


def test_forward_backward_and_step_in_one_graph() -> None:
    def make() -> tuple[nn.Module, AdamW8bit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 16)).cuda()
        return model, AdamW8bit(model.parameters(), lr=1e-2)

    inputs = torch.randn(32, 128, device="cuda")

    def train(model: nn.Module, optimizer: AdamW8bit) -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    (model, optimizer), (twin, eager) = make(), make()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            train(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        train(model, optimizer)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        train(twin, eager)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
        assert int(optimizer.state[one]["step"]) == 8


def test_a_first_step_is_not_captured() -> None:
    (parameter,) = parameters(torch.float32, (5000,))
    parameter.grad = torch.ones_like(parameter)
    loaded = with_states(AdamW8bit([parameter]), [random_state(5000, "adam", 8, 0)])
    for optimizer in (loaded, AdamW8bit([parameter])):
        with (
            pytest.raises(QtoolError, match="first step"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()


def test_a_step_does_not_wait_for_the_device() -> None:
    tensors = parameters(torch.bfloat16)
    optimizer = AdamW8bit(tensors)
    for seed in range(2):
        give_gradients(tensors, seed)
        optimizer.step()
    give_gradients(tensors, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        before = torch.cuda.Event()
        before.record()
        optimizer.step()
        assert not before.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_states_that_move_are_found_again() -> None:
    """Programs move states to the host between steps to make room."""
    tensors = parameters(torch.float32)
    optimizer = AdamW8bit(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].cpu()
    with pytest.raises(QtoolError, match=r"on cuda:0, and its \w+ is .* on cpu"):
        optimizer.step()
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].cuda()
    expected = reference_step(optimizer)
    optimizer.step()
    assert_same(optimizer, expected)


def test_the_cpus_bits(tmp_path: Path) -> None:
    on_gpu = parameters(torch.bfloat16)
    on_cpu = [nn.Parameter(p.detach().cpu()) for p in on_gpu]
    first, second = AdamW8bit(on_gpu), AdamW8bit(on_cpu)
    for seed in range(3):
        give_gradients(on_gpu, seed)
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert one.grad is not None
            other.grad = one.grad.cpu()
        first.step()
        second.step()
    expected = [
        (q, p.detach().cpu(), {name: t.cpu() for name, t in first.state[p].items()})
        for p, q in zip(on_gpu, on_cpu, strict=True)
    ]
    assert_same(second, expected)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    loaded = Adam8bit(on_cpu)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(loaded, expected)


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedLion8bit])
def test_paged_states_give_the_same(kind: Callable[..., EightBitOptimizer]) -> None:
    counts = (SMALLEST_PAGED + 77, 5000, 300, 2 * SMALLEST_PAGED)
    tensors = parameters(torch.bfloat16, counts)
    allocated = torch.cuda.memory_allocated()
    optimizer = kind(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    gradient_bytes = sum(p.nbytes for p in tensors)
    assert torch.cuda.memory_allocated() - allocated < gradient_bytes + SMALLEST_PAGED
    for seed in (1, 2):
        give_gradients(tensors, seed)
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)
    other = kind([nn.Parameter(p.detach().clone()) for p in tensors])
    other.load_state_dict(optimizer.state_dict())
    for one, parameter in zip(tensors, other.param_groups[0]["params"], strict=True):
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, other.state[parameter][name])


def test_marked_parameters_and_several_dtypes() -> None:
    tensors = [p for dtype in DTYPES for p in parameters(dtype, (5000, 4096))]
    keep_32bit(tensors[0], tensors[3])
    optimizer = AdamW8bit(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    for seed in (1, 2):
        give_gradients(tensors, seed)
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)
    assert [optimizer.state[p]["state1"].dtype == torch.uint8 for p in tensors] == [
        False, True, True, False, True, True,
    ]  # fmt: skip


def test_root_and_reciprocal_are_correctly_rounded() -> None:
    """All significands, through a step: with m = 1 the step is 1 / (sqrt(v) + 0)."""
    count = 1 << 24
    bits = torch.arange(count, dtype=torch.int32, device="cuda") + 0x3F800000  # [1, 4)
    second = bits.view(torch.float32)
    parameter = nn.Parameter(torch.zeros(count, device="cuda"))
    parameter.grad = torch.zeros(count, device="cuda")
    keep_32bit(parameter)
    for scale in (2.0**-90, 2.0**-1, 1.0, 2.0**40):
        optimizer = Adam8bit([parameter], lr=1.0, betas=(0.5, 0.5), eps=0.0)
        state = {
            "step": torch.tensor(60),
            "state1": torch.full((count,), 2.0),
            "state2": (second * scale * 2).cpu(),
        }
        with_states(optimizer, [state])
        parameter.data.zero_()
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)
