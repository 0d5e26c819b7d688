"""State dicts to and from bitsandbytes, and its optimizers on the CPU as an independent oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.optim import (
    Adam8bit,
    AdamW8bit,
    EightBitOptimizer,
    Lion8bit,
    SGD8bit,
    from_bitsandbytes,
    to_bitsandbytes,
)

bitsandbytes = pytest.importorskip("bitsandbytes")

PAIRS: list[tuple[type[EightBitOptimizer], str, dict[str, Any]]] = [
    (AdamW8bit, "AdamW8bit", {"lr": 1e-3, "weight_decay": 0.1}),
    (Adam8bit, "Adam8bit", {"lr": 1e-3}),
    (Lion8bit, "Lion8bit", {"lr": 1e-4, "weight_decay": 0.1}),
    (SGD8bit, "SGD8bit", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
]
each_pair = pytest.mark.parametrize(
    ("kind", "name", "options"), PAIRS, ids=[name for _, name, _ in PAIRS]
)


def parameters() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=random))
        for shape in [(200, 300), (100,), (4097,)]
    ]


def give_gradients(*lists: list[nn.Parameter], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randn(same[0].shape, generator=random) * 0.01
        for parameter in same:
            parameter.grad = gradient.clone()


def steps(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], count: int) -> None:
    for seed in range(count):
        give_gradients(tensors, seed=seed)
        optimizer.step()


@each_pair
def test_one_step_from_the_same_state_is_theirs(
    kind: type[EightBitOptimizer], name: str, options: dict[str, Any]
) -> None:
    """Their codes on the CPU are not always the nearest ones; ours are as near or nearer."""
    ours, theirs = parameters(), parameters()
    first = kind(ours, **options)
    steps(first, ours, 4)
    for one, other in zip(ours, theirs, strict=True):
        other.data.copy_(one.data)
    second = getattr(bitsandbytes.optim, name)(theirs, **options)
    second.load_state_dict(to_bitsandbytes(copy.deepcopy(first.state_dict())))
    give_gradients(ours, theirs, seed=9)
    first.step()
    second.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
        mine, his = first.state[one], second.state[other]
        assert int(mine["step"]) == his["step"] == 5
        for i in (1, 2):
            if f"absmax{i}" not in mine:
                continue
            assert torch.allclose(mine[f"absmax{i}"], his[f"absmax{i}"], rtol=1e-5)
            apart = (mine[f"state{i}"].int() - his[f"state{i}"].int()).abs()
            assert (apart > 0).float().mean() < 0.05 and apart.max() <= 7


@each_pair
def test_theirs_load_ours_and_go_on(
    kind: type[EightBitOptimizer], name: str, options: dict[str, Any]
) -> None:
    ours = parameters()
    first = kind(ours, **options)
    steps(first, ours, 2)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    second = getattr(bitsandbytes.optim, name)(theirs, **options | {"lr": 9.0})
    second.load_state_dict(to_bitsandbytes(first.state_dict()))
    group = second.param_groups[0]
    assert group["lr"] == options["lr"]
    assert group["weight_decay"] == options.get("weight_decay", 0.0)
    for seed in range(20, 40):
        give_gradients(ours, theirs, seed=seed)
        first.step()
        second.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().mean() < 3e-5 * one.abs().mean()


@each_pair
def test_ours_load_theirs_and_give_it_back(
    kind: type[EightBitOptimizer], name: str, options: dict[str, Any]
) -> None:
    theirs = parameters()
    second = getattr(bitsandbytes.optim, name)(theirs, **options)
    steps(second, theirs, 3)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    first = kind(ours, lr=9.0)
    first.load_state_dict(from_bitsandbytes(second.state_dict(), kind))
    assert first.param_groups[0]["lr"] == options["lr"]
    back = to_bitsandbytes(first.state_dict())
    same = second.state_dict()
    assert_same(back["state"], same["state"])
    assert {key: back["param_groups"][0][key] for key in same["param_groups"][0]} == same[
        "param_groups"
    ][0]
    give_gradients(ours, theirs, seed=9)
    first.step()
    second.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


def test_flat_state_dicts_of_older_versions_are_taken() -> None:
    theirs = parameters()
    second = bitsandbytes.optim.AdamW8bit(theirs)
    steps(second, theirs, 1)
    saved = second.state_dict()
    for state in saved["state"].values():
        state |= state.pop("__bnb_optimizer_quant_state__")
    first = AdamW8bit(parameters())
    first.load_state_dict(from_bitsandbytes(saved, AdamW8bit))
    assert len(first.state) == 3


def test_what_cannot_be_converted_says_so() -> None:
    theirs = parameters()
    second = bitsandbytes.optim.AdamW8bit(theirs)
    steps(second, theirs, 1)
    with pytest.raises(QtoolError, match="bitsandbytes'") as error:
        AdamW8bit(parameters()).load_state_dict(second.state_dict())
    assert "from_bitsandbytes" in error.value.hint
    with pytest.raises(QtoolError, match=r"it has .*state2.* instead of"):
        from_bitsandbytes(second.state_dict(), Lion8bit)
    saved = copy.deepcopy(second.state_dict())
    nested = saved["state"][0]["__bnb_optimizer_quant_state__"]
    nested["qmap1"] = nested["qmap1"] * 2
    with pytest.raises(QtoolError, match="not the dynamic map"):
        from_bitsandbytes(saved, AdamW8bit)
    last = nn.Parameter(torch.randn(16, 8, 8, 8).to(memory_format=torch.channels_last))
    last.grad = torch.randn_like(last)
    ours = AdamW8bit([last])
    ours.step()
    with pytest.raises(QtoolError, match="not contiguous"):
        to_bitsandbytes(ours.state_dict())


def test_our_codes_are_nearer_than_theirs() -> None:
    """From zero states, where the exact moments are known."""
    ours, theirs = parameters(), parameters()
    first = AdamW8bit(ours)
    second = bitsandbytes.optim.AdamW8bit(theirs)
    give_gradients(ours, theirs, seed=1)
    first.step()
    second.step()
    gradient = ours[0].grad
    assert gradient is not None
    for i, exact in ((1, gradient.double() * 0.1), (2, gradient.double() ** 2 * 0.001)):
        errors = []
        for state in (first.state[ours[0]], second.state[theirs[0]]):
            code = torch.tensor(dynamic_map(i == 1)).double()
            scale = state[f"absmax{i}"].double().repeat_interleave(256)[: exact.numel()]
            found = code[state[f"state{i}"].long().flatten()] * scale
            errors.append((found - exact.flatten()).abs())
        worse = errors[0] > errors[1] + 1e-6 * exact.abs().max()
        assert not bool(worse.any())
        assert bool((errors[1] > errors[0] + 1e-6 * exact.abs().max()).any())
