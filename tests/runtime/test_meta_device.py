"""Building models on the meta device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from qtool.runtime.meta_device import WithoutMetaArithmetic


def test_nothing_is_drawn_on_the_meta_device() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with WithoutMetaArithmetic(), torch.device("meta"):
        parts = (nn.Embedding(3, 4), nn.Linear(3, 4))
        counted = 2.0 ** (torch.arange(0, 4) / 4)
        mixed = counted * torch.ones(4)
    assert all(weight.is_meta for part in parts for weight in part.parameters())
    assert torch.equal(counted, 2.0 ** (torch.arange(0, 4) / 4))
    assert mixed.is_meta
    assert mixed.shape == (4,)
    assert torch.equal(torch.get_rng_state(), before)


def test_elsewhere_values_are_drawn_and_errors_come_as_before() -> None:
    with WithoutMetaArithmetic():
        torch.manual_seed(0)
        drawn = nn.Embedding(3, 4).weight
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.ones(3) + torch.ones(2)
        with pytest.raises(NotImplementedError, match="no data"):
            torch.ones(2).copy_(torch.ones(2, device="meta"))
    torch.manual_seed(0)
    assert torch.equal(drawn, nn.Embedding(3, 4).weight)


def test_room_is_made_without_the_packages_of_the_compiler() -> None:
    program = """
import sys, torch
from qtool.runtime.meta_device import WithoutMetaArithmetic
with WithoutMetaArithmetic():
    room = torch.empty_like(torch.empty(3, 4, device="meta"), device="cpu")
print(room.device.type, *room.shape, "sympy" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["cpu", "3", "4", "False"]
