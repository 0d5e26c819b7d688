"""A parameter that an optimizer updates, and its gradient as the kernels want it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.optimizer_states import BLOCKSIZE
from qtool.optim.states import bits_of, check_parameter


class Member(NamedTuple):
    """A parameter with its state.

    Attributes:
        state: see `qtool.optim.states`.
        group: the place of its group in `param_groups`.
    """

    parameter: Tensor
    state: dict[str, Any]
    group: int


def check_member(member: Member, device: torch.device, dtype: torch.dtype) -> None:
    """Raise QtoolError unless parameter and state are on `device` and fit each other."""
    parameter, state = member.parameter, member.state
    check_parameter(parameter)
    has_codes = bits_of(state) == 8
    num_blocks = -(-parameter.numel() // BLOCKSIZE)
    for name, tensor in state.items():
        if name == "step":
            wanted, fits = torch.int64, tensor.numel() == 1
        elif name.startswith("absmax"):
            wanted, fits = torch.float32, tensor.shape == (num_blocks,) and tensor.is_contiguous()
        else:
            wanted = torch.uint8 if has_codes else torch.float32
            fits = tensor.shape == parameter.shape and tensor.stride() == parameter.stride()
        if not fits or tensor.dtype != wanted or tensor.device != device:
            raise _misfit(parameter, f"its {name} is {_in_words(tensor)}")
    if parameter.device != device or parameter.dtype != dtype:
        raise _misfit(parameter, f"it was {dtype} on {device} when its state was made")


def _misfit(parameter: Tensor, what: str) -> QtoolError:
    return QtoolError(
        f"a parameter is {_in_words(parameter)}, and {what}",
        kind="unsupported",
        hint="move and convert a model before the first step; move states only with it",
    )


def _in_words(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def fitting_gradient(parameter: Tensor) -> Tensor:
    """The gradient, laid out in memory as the parameter is: a copy if it is not.

    Raises:
        QtoolError: it is sparse, or of another dtype.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise QtoolError(
            f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which 8-bit "
            "optimizers do not take",
            kind="unsupported",
            hint="make its embedding with sparse=False, or give it to torch.optim.SparseAdam",
        )
    if gradient.dtype != parameter.dtype:
        raise QtoolError(
            f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} and its gradient "
            f"{gradient.dtype}; they must be the same",
            kind="unsupported",
            hint="convert the gradient before the step",
        )
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return gradient
