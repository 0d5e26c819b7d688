"""Optimizers as they allocate: PyTorch's AdamW, and bitsandbytes' with 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from qtool.exact.records import Optimizer

BLOCKSIZE: Final = 256  # states that share an absmax
# bitsandbytes keeps the states of smaller tensors in float32.
SMALLEST_PACKED: Final = 4096


def build_optimizer(name: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameters`."""
    if name == "adamw":
        # What PyTorch chooses by itself on a GPU: all parameters in one go.
        return torch.optim.AdamW(parameters, foreach=True)
    return EightBitAdamW(parameters)


class EightBitAdamW(torch.optim.Optimizer):
    """Allocates bitsandbytes' blockwise 8-bit states, two per parameter; updates nothing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make the states of parameters that have a gradient for the first time."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = new_states(parameter)


def new_states(parameter: Tensor) -> dict[str, Any]:
    """8-bit states of a parameter: codes of its shape, and what they are scaled by."""
    states: dict[str, Any] = {}
    for name in ("state1", "state2"):
        if parameter.numel() < SMALLEST_PACKED:
            states[name] = torch.zeros_like(parameter, dtype=torch.float32)
            continue
        states[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        num_blocks = -(-parameter.numel() // BLOCKSIZE)
        states[f"absmax_{name}"] = parameter.new_zeros(num_blocks, dtype=torch.float32)
    return states
