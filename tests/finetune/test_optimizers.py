"""Every optimizer that `estimate` plans is there, and its states take what the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.finetune.optimizers import optimizer_class
from qtool.planner.optimizers import OPTIMIZERS, Optimizer

NAMES = [optimizer for optimizer in OPTIMIZERS if not optimizer.is_paged]


@pytest.mark.parametrize("planned", NAMES, ids=lambda optimizer: optimizer.name)
def test_states_take_what_is_planned(planned: Optimizer) -> None:
    parameter = nn.Parameter(torch.ones(128, 64))
    cls, options = optimizer_class(planned.name, lr=1e-3, weight_decay=0.01)
    optimizer = cls([parameter], **options)
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    assert not torch.equal(parameter.detach(), torch.ones(128, 64))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)
    states = [
        value
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    expected = planned.state_bytes(tuple(parameter.shape), element_bytes=4)
    assert sum(state.nbytes for state in states) == expected


@pytest.mark.parametrize("planned", [o for o in OPTIMIZERS if o not in NAMES], ids=lambda o: o.name)
def test_paged_ones_want_a_gpu(planned: Optimizer) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cls, options = optimizer_class(planned.name, lr=1e-3, weight_decay=0.0)
    with pytest.raises(QtoolError, match="need an NVIDIA GPU"):
        cls([nn.Parameter(torch.ones(4))], **options)


def test_names_of_transformers_are_known_too() -> None:
    assert (
        optimizer_class("adamw_bnb_8bit", lr=1, weight_decay=0)[0]
        is (optimizer_class("adamw-8bit", lr=1, weight_decay=0)[0])
    )
