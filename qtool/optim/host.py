"""Updates in host memory: the CPU's kernels, on PyTorch's number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qtool.backends.cpu import BIT_DTYPES
from qtool.formats.optimizer_states import BLOCKSIZE
from qtool.optim.members import Member, check_member, fitting_gradient
from qtool.optim.rules import Algorithm, Hyperparameters, scalars_of
from qtool.optim.states import DTYPES

# A piece of work: in bfloat16 2.6 MB, which takes a millisecond; handing it over, microseconds.
PIECE_BLOCKS: Final = 1 << 10


class HostBatch:
    """Parameters in host memory.

    Args:
        members: of any dtype and number of bits.
    """

    def __init__(self, algorithm: Algorithm, members: Sequence[Member]) -> None:
        self._algorithm = algorithm
        self._members = members

    def step(self, settings: Sequence[Hyperparameters]) -> None:
        """Update all parameters that have a gradient, with the settings of their groups."""
        gradients: list[Tensor] = []  # kept until the work is done
        pieces = [
            piece
            for member in self._members
            if member.parameter.grad is not None
            for piece in self._pieces(member, settings[member.group], gradients)
        ]
        run_pieces(pieces)

    def _pieces(
        self, member: Member, settings: Hyperparameters, gradients: list[Tensor]
    ) -> Iterator[partial[None]]:
        check_member(member, torch.device("cpu"), member.parameter.dtype)
        parameter, state = member.parameter, member.state
        gradient = fitting_gradient(parameter)
        gradients.append(gradient)
        step = state["step"].add_(1)
        scalars = np.array(astuple(scalars_of(self._algorithm, settings, int(step))), np.float32)
        update = _kernel(self._algorithm, parameter.dtype, state["state1"].dtype)
        addresses = [
            state[name].data_ptr() if name in state else 0
            for name in ("state1", "state2", "absmax1", "absmax2")
        ]
        tensors = parameter.data_ptr(), gradient.data_ptr(), *addresses
        num_blocks = -(-parameter.numel() // BLOCKSIZE)
        for first in range(0, num_blocks, PIECE_BLOCKS):
            last = min(first + PIECE_BLOCKS, num_blocks)
            yield partial(update, *tensors, parameter.numel(), scalars, first, last)


def run_pieces(pieces: Sequence[partial[None]]) -> None:
    """Call all of them, on several threads if there are several."""
    num_threads = min(torch.get_num_threads(), len(pieces))
    if num_threads <= 1:
        for piece in pieces:
            piece()
        return
    waiting = iter(pieces)  # next() is atomic

    def work() -> None:
        for piece in waiting:
            piece()

    others = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    work()
    for other in others:
        if not other.cancel():
            other.result()


@cache
def _kernel(algorithm: Algorithm, dtype: torch.dtype, state_dtype: torch.dtype) -> Any:
    from qtool.backends.cpu_optimizer import update_kernel

    value_type: Any = BIT_DTYPES[DTYPES[dtype]]
    state_type: Any = np.uint8 if state_dtype == torch.uint8 else np.float32
    return update_kernel(algorithm, value_type, state_type)


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="optimizer")
