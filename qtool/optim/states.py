"""The state of a parameter: how it is stored, and its making.

    step      int64 (): updates so far
    state1    uint8 codes or float32, shape and strides of the parameter
    absmax1   float32 (ceil(n/256),), beside codes
    state2, absmax2: the same, for Adam

Blocks are of values that are neighbours in memory. States of fewer than 4096 values, and those of
parameters that are marked, are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.optimizer_states import BLOCKSIZE, SMALLEST_8BIT
from qtool.formats.tensors import SourceDtype
from qtool.optim.rules import Algorithm

ParameterState = dict[str, Any]  # what `torch.optim.Optimizer.state` has for a parameter

DTYPES: Final[dict[torch.dtype, SourceDtype]] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
NUM_STATES: Final[dict[Algorithm, int]] = {"adam": 2, "lion": 1, "momentum": 1}
# Paged states of smaller parameters stay on the device: they are no burden.
SMALLEST_PAGED: Final = 100_000
_MARK: Final = "keep_32bit_states"


def keep_32bit(*parts: nn.Module | Tensor) -> None:
    """Mark parameters, or all parameters of modules, so that their states will be float32.

    For optimizers whose states are not made yet. A copy of a parameter has no mark.
    """
    for part in parts:
        for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
            setattr(parameter, _MARK, True)


def keep_embeddings_32bit(model: nn.Module) -> None:
    """`keep_32bit` for all embeddings: most of their rows get no gradient in a step."""
    keep_32bit(*(m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)))


def state_bits(parameter: Tensor) -> int:
    """8 or 32, for a state that is not made yet."""
    is_small = parameter.numel() < SMALLEST_8BIT
    return 32 if is_small or getattr(parameter, _MARK, False) else 8


def state_names(algorithm: Algorithm, bits: int) -> tuple[str, ...]:
    """The keys of a parameter's state."""
    numbers = range(1, NUM_STATES[algorithm] + 1)
    absmax = [f"absmax{i}" for i in numbers] if bits == 8 else []
    return ("step", *(f"state{i}" for i in numbers), *absmax)


def bits_of(state: ParameterState) -> int:
    """8 or 32, of a state that exists."""
    return 8 if "absmax1" in state else 32


def check_parameter(parameter: Tensor) -> None:
    """Raise QtoolError for parameters that no kernel can update."""
    shape = tuple(parameter.shape)
    if parameter.dtype not in DTYPES:
        raise QtoolError(
            f"a parameter of shape {shape} is {parameter.dtype}; bfloat16, float16 and float32 "
            "can be updated",
            kind="unsupported",
            hint="give such parameters to an optimizer of torch.optim",
        )
    if parameter.device.type not in ("cpu", "cuda"):
        raise QtoolError(
            f"a parameter of shape {shape} is on {parameter.device}; there are kernels for "
            "NVIDIA GPUs and for the CPU",
            kind="unsupported",
            hint="move the model to a CUDA device or to the CPU",
        )
    if torch.empty_like(parameter).stride() != parameter.stride():
        raise QtoolError(
            f"a parameter of shape {shape} has strides {parameter.stride()}: its values lie apart "
            "in memory, or one stands for several",
            kind="unsupported",
            hint="make it a tensor of its own: nn.Parameter(parameter.detach().clone())",
        )


def new_states(
    parameters: list[Tensor], algorithm: Algorithm, *, paged: bool
) -> list[ParameterState]:
    """States of zeros; nothing is decided but the bits.

    Raises:
        QtoolError: a parameter that cannot be updated; paged states without a GPU; a CUDA graph is
            being captured.
    """
    for parameter in parameters:
        check_parameter(parameter)
        if parameter.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise first_step_captured()
    counters = step_counters((0, parameter.device) for parameter in parameters)
    return [
        {
            name: counter if name == "step" else _zeros(parameter, name, bits, paged=paged)
            for name in state_names(algorithm, bits)
        }
        for parameter, counter in zip(parameters, counters, strict=True)
        for bits in (state_bits(parameter),)
    ]


def first_step_captured() -> QtoolError:
    """What is raised where a CUDA graph would hold the making of states."""
    return QtoolError(
        "the first step of an optimizer cannot be captured in a CUDA graph: it makes states and "
        "loads kernels",
        kind="unsupported",
        hint="run a few steps before the capture, as PyTorch's notes on CUDA graphs show",
    )


def step_counters(steps: Iterable[tuple[int, torch.device]]) -> list[Tensor]:
    """int64 () tensors; those of a device share memory, of which the allocator gives 512 bytes."""
    wanted = list(steps)
    by_device: dict[torch.device, list[int]] = {}
    for step, device in wanted:
        by_device.setdefault(device, []).append(step)
    counters = {
        device: iter(torch.tensor(values, dtype=torch.int64).to(device).unbind())
        for device, values in by_device.items()
    }
    return [next(counters[device]) for _, device in wanted]


def _zeros(parameter: Tensor, name: str, bits: int, *, paged: bool) -> Tensor:
    if name.startswith("absmax"):
        num_blocks = -(-parameter.numel() // BLOCKSIZE)
        return torch.zeros(num_blocks, dtype=torch.float32, device=parameter.device)
    dtype = torch.uint8 if bits == 8 else torch.float32
    return empty_state(parameter, dtype, paged=paged).zero_()


def empty_state(parameter: Tensor, dtype: torch.dtype, *, paged: bool) -> Tensor:
    """A tensor like `parameter` of `dtype`; in managed memory if it is `paged` and large."""
    if not paged or parameter.numel() < SMALLEST_PAGED:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if parameter.device.type != "cuda":
        raise QtoolError(
            f"paged states need an NVIDIA GPU; a parameter of shape {tuple(parameter.shape)} is "
            f"on {parameter.device}",
            kind="unsupported",
            hint="move the model to the GPU before the first step, or take the optimizer without "
            "Paged in its name",
        )
    from cupy_kernels.managed_memory import ManagedMemory

    with torch.cuda.device(parameter.device):
        memory = ManagedMemory(parameter.numel() * dtype.itemsize)
        flat = torch.as_tensor(memory, device=parameter.device).view(dtype)
    return flat.as_strided(parameter.shape, parameter.stride())
