"""The optimizers as `torch.optim.Optimizer`s, on the CPU."""

from __future__ import annotations

import copy
import io
import pickle
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
    SGD8bit,
    keep_32bit,
    keep_embeddings_32bit,
)
from tests.optim.steps import DTYPES, assert_same, odd_gradient, reference_step

CLASSES: list[type[EightBitOptimizer]] = [AdamW8bit, Adam8bit, Lion8bit, SGD8bit]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    shapes = [(70, 70), (30,), (64, 65), (4095,), ()]
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def give_gradients(tensors: list[nn.Parameter], seed: int) -> None:
    for i, parameter in enumerate(tensors):
        gradient = odd_gradient(max(parameter.numel(), 1), parameter.dtype, 100 * seed + i)
        parameter.grad = gradient.view(parameter.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_steps_are_the_references(kind: type[EightBitOptimizer], dtype: torch.dtype) -> None:
    """Three steps in two groups; a parameter without a gradient keeps value, state and step."""
    tensors = parameters(dtype)
    groups: list[dict[str, Any]] = [
        {"params": tensors[:2], "lr": 1e-2},
        {"params": tensors[2:], "weight_decay": 0.1},
    ]
    optimizer = kind(groups, lr=1e-3)
    give_gradients(tensors, 0)
    optimizer.step()
    for seed in (1, 2, 3):
        give_gradients(tensors, seed)
        if seed == 2:
            tensors[0].grad = None
        expected = reference_step(optimizer)
        optimizer.step()
        assert_same(optimizer, expected)
    assert [int(optimizer.state[p]["step"]) for p in tensors] == [3, 4, 4, 4, 4]


def test_states_take_2_03_bytes_a_parameter() -> None:
    parameter = nn.Parameter(torch.randn(1024, 1024))
    parameter.grad = torch.randn(1024, 1024)
    optimizer = AdamW8bit([parameter])
    optimizer.step()
    num_bytes = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())
    assert num_bytes / parameter.numel() <= 2.0313


def test_only_large_tensors_have_8_bit_states() -> None:
    tensors = parameters()
    optimizer = AdamW8bit(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    dtypes = [optimizer.state[p]["state1"].dtype for p in tensors]
    small, large = torch.float32, torch.uint8
    assert dtypes == [large, small, large, small, small]


def test_marked_parameters_and_embeddings_have_32_bit_states() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.Linear(100, 64))
    keep_embeddings_32bit(model)
    keep_32bit(model[2])
    optimizer = AdamW8bit(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    dtypes = [optimizer.state[module.weight]["state1"].dtype for module in model]
    assert dtypes == [torch.float32, torch.uint8, torch.float32]


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    parameter = nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 5000 and losses[2] < losses[1] < losses[0]


def test_groups_that_are_added_later_and_first_gradients_that_come_later() -> None:
    tensors = parameters()
    optimizer = SGD8bit(tensors[:2], lr=0.1)
    tensors[0].grad = torch.ones(70, 70)
    optimizer.step()
    optimizer.add_param_group({"params": tensors[2:], "lr": 0.5, "momentum": 0.0})
    before = [p.detach().clone() for p in tensors]
    for parameter in tensors:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [(old - p).flatten()[0].item() for old, p in zip(before, tensors, strict=True)]
    assert moved == pytest.approx([0.19, 0.1, 0.5, 0.5, 0.5], rel=1e-2)


def test_the_learning_rate_may_be_a_tensor_and_be_scheduled() -> None:
    tensors, twins = parameters(), parameters()
    rate = torch.tensor(1e-2)
    first, second = AdamW8bit(tensors, lr=rate), AdamW8bit(twins, lr=float(rate))
    for seed in range(2):
        give_gradients(tensors, seed)
        give_gradients(twins, seed)
        first.step()
        second.step()
        rate.mul_(0.5)
        second.param_groups[0]["lr"] = float(rate)
    assert all(torch.equal(p, q) for p, q in zip(tensors, twins, strict=True))
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 1 / (1 + step))
    second.step()
    schedule.step()
    assert second.param_groups[0]["lr"] < float(rate)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    for kind in CLASSES:
        tensors = parameters()
        before = [p.detach().clone() for p in tensors]
        optimizer = kind(tensors, lr=0.0)
        give_gradients(tensors, 0)
        optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(tensors, before, strict=True))


def test_any_dense_memory_format_and_gradients_in_another_one() -> None:
    """Blocks follow the memory: channels last is the flat tensor in another order."""
    weight = torch.randn(16, 8, 8, 8)
    last = nn.Parameter(weight.to(memory_format=torch.channels_last))
    flat = nn.Parameter(weight.permute(0, 2, 3, 1).contiguous())
    gradient = torch.randn(16, 8, 8, 8)
    last.grad, flat.grad = gradient, gradient.permute(0, 2, 3, 1).contiguous()
    optimizers = [AdamW8bit([last], lr=0.1), AdamW8bit([flat], lr=0.1)]
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(last.permute(0, 2, 3, 1), flat)
    first, second = (o.state[p] for o, p in zip(optimizers, (last, flat), strict=True))
    assert torch.equal(first["state2"].permute(0, 2, 3, 1), second["state2"])
    assert torch.equal(first["absmax1"], second["absmax1"])


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_state_goes_on_to_the_bit(
    kind: type[EightBitOptimizer], dtype: torch.dtype
) -> None:
    tensors = parameters(dtype)
    optimizer = kind(tensors, lr=1e-2)
    give_gradients(tensors, 0)
    tensors[3].grad = None  # it has no state yet
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in tensors]
    loaded = kind(twins)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.param_groups[0]["lr"] == 1e-2
    for seed in (1, 2):
        for some, stepper in ((tensors, optimizer), (twins, loaded)):
            give_gradients(some, seed)
            stepper.step()
    for one, other in zip(tensors, twins, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, loaded.state[other][name]), name


def test_loading_copies() -> None:
    tensors = parameters()
    optimizer = AdamW8bit(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = AdamW8bit(parameters())
    other.load_state_dict(saved)
    state = other.state[other.param_groups[0]["params"][0]]
    state["state1"].zero_()
    state["step"].zero_()
    assert int(saved["state"][0]["step"]) == 1 and saved["state"][0]["state1"].any()


def test_copies_and_pickles_go_on() -> None:
    for twin_of in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        tensors = parameters()
        optimizer = AdamW8bit(tensors, lr=1e-2)
        give_gradients(tensors, 0)
        optimizer.step()
        twin = twin_of(optimizer)
        twins = twin.param_groups[0]["params"]
        give_gradients(tensors, 1)
        give_gradients(twins, 1)
        optimizer.step()
        twin.step()
        pairs = zip(tensors, twins, strict=True)
        assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in pairs)


def test_states_of_another_kind_or_shape_are_refused() -> None:
    tensors = parameters()
    optimizer = AdamW8bit(tensors)
    give_gradients(tensors, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(QtoolError, match="Lion8bit has step, state1, absmax1"):
        Lion8bit(parameters()).load_state_dict(saved)
    with pytest.raises(QtoolError, match=r"state1 has shape \(70, 70\); the parameter wants"):
        AdamW8bit(list(reversed(parameters()))).load_state_dict(saved)
    with pytest.raises(ValueError, match="group"):
        AdamW8bit(tensors[:2]).load_state_dict(saved)


def test_states_in_another_memory_format_are_refused() -> None:
    last = nn.Parameter(torch.randn(16, 8, 8, 8).to(memory_format=torch.channels_last))
    last.grad = torch.randn_like(last)
    optimizer = AdamW8bit([last])
    optimizer.step()
    with pytest.raises(QtoolError, match="by strides"):
        AdamW8bit([nn.Parameter(torch.randn(16, 8, 8, 8))]).load_state_dict(optimizer.state_dict())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, "a tensor of 2 values"),
        ({"betas": (0.9, 1.0)}, "betas or momentum of 1.0"),
        ({"eps": 2.0}, "eps is 2.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW8bit(parameters(), **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.arange(3)).sum().backward()
    optimizer = AdamW8bit(embedding.parameters())
    with pytest.raises(QtoolError, match=r"shape \(100, 64\) has a sparse gradient") as error:
        optimizer.step()
    assert "sparse=False" in error.value.hint


def test_dtypes_and_layouts_that_no_kernel_takes_are_refused() -> None:
    double = nn.Parameter(torch.ones(5000, dtype=torch.float64))
    apart = nn.Parameter(torch.ones(100, 100)[:, ::2])
    for parameter, message in ((double, "is torch.float64"), (apart, r"strides \(100, 2\)")):
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(QtoolError, match=message):
            AdamW8bit([parameter]).step()


def test_a_model_that_changes_its_dtype_under_way_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(5000))
    parameter.grad = torch.ones(5000)
    optimizer = AdamW8bit([parameter])
    optimizer.step()
    optimizer.state[parameter]["state1"] = optimizer.state[parameter]["state1"].float()
    with pytest.raises(QtoolError, match=r"its state1 is torch\.float32"):
        optimizer.step()


def test_paged_states_need_a_gpu() -> None:
    if torch.cuda.is_available():
        parameter = nn.Parameter(torch.ones(200_000))
        parameter.grad = torch.ones(200_000)
        with pytest.raises(QtoolError, match="is on cpu"):
            PagedAdamW8bit([parameter]).step()
    else:
        with pytest.raises(QtoolError, match="paged states need an NVIDIA GPU"):
            PagedAdamW8bit(parameters())


def test_the_memory_of_gradients_is_free_after_a_step() -> None:
    """`zero_grad` must be able to free them: an optimizer holds none."""
    import weakref

    parameter = nn.Parameter(torch.ones(5000))
    parameter.grad = torch.ones(5000)
    gradient = weakref.ref(parameter.grad)
    optimizer = AdamW8bit([parameter])
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


@pytest.mark.parametrize("num_kept", [0, 4])
def test_a_state_that_was_taken_away_begins_anew(num_kept: int) -> None:
    tensors = parameters()
    optimizer = AdamW8bit(tensors, lr=1e-2)
    for seed in range(3):
        give_gradients(tensors, seed)
        optimizer.step()
    for parameter in tensors[num_kept:]:
        del optimizer.state[parameter]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in tensors]
    give_gradients(copies, 2)
    AdamW8bit(copies, lr=1e-2).step()
    optimizer.step()
    for number, (parameter, copied) in enumerate(zip(tensors, copies, strict=True)):
        is_anew = number >= num_kept
        assert int(optimizer.state[parameter]["step"]) == (1 if is_anew else 4)
        assert not is_anew or torch.equal(parameter.nan_to_num(), copied.nan_to_num())
    assert len(optimizer.state_dict()["state"]) == len(tensors)


def test_a_group_that_is_refused_is_not_there() -> None:
    first, second = parameters()[:2]
    optimizer = AdamW8bit([first])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [second], "lr": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], "lr": 1})
