"""Updates on a GPU: all parameters of a dtype in a few launches, without waiting for the device.

The kernels find the tensors in a table in device memory. It is written before the first step, and
again when an address changes; new gradients, which PyTorch makes for every step, are one launch.
Steps are counted on the device, so a step can be captured in a CUDA graph. A captured step has a
table of its own, which stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cupy_kernels import OLDEST_COMPUTE_CAPABILITY
from qtool.backends.cuda_driver import INSTALL_HINT
from qtool.errors import QtoolError
from qtool.optim.members import Member, check_member, fitting_gradient
from qtool.optim.rules import Algorithm, Hyperparameters
from qtool.optim.states import (
    DTYPES,
    SMALLEST_PAGED,
    bits_of,
    first_step_captured,
    state_names,
)

if TYPE_CHECKING:
    from cupy_kernels.optimizer_8bit import GroupSettings, OptimizerStep

_ABSENT: Final = 0  # the address of what is not there


class DeviceBatch:
    """Parameters on one GPU, of one dtype and number of bits.

    Args:
        members: at least one, all with states.
        paged: large states are in managed memory, to be fetched before a step.

    Raises:
        QtoolError: the GPU or what is installed is not enough.
    """

    def __init__(self, algorithm: Algorithm, members: Sequence[Member], *, paged: bool) -> None:
        first = members[0]
        self._device, self._dtype = first.parameter.device, first.parameter.dtype
        check_device(self._device)
        self._algorithm = algorithm
        self._members = members
        self._paged = paged
        self._bits = bits_of(first.state)
        self._names = state_names(algorithm, self._bits)
        self._states_of = itemgetter(*self._names)
        self._table: _Table | None = None
        self._captured: list[_Table] = []  # tables that CUDA graphs read
        self._addresses: list[int] = []  # of values and states in the table
        self._gradients: list[int] = []

    def step(self, settings: Sequence[Hyperparameters]) -> None:
        """Queue updating all parameters that have a gradient, with the settings of their groups.

        Raises:
            QtoolError: a gradient that does not fit, or a state that is not what it was.
        """
        # Copies are freed when the launches are queued: their memory is reused behind them.
        gradients, _copies = self._current_gradients()
        if not any(gradients):
            return
        addresses = self._current_addresses()
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            if torch.cuda.is_current_stream_capturing():
                table = self._captured_table(gradients, stream)
            else:
                table = self._written_table(addresses, gradients, stream)
                if self._paged:
                    self._fetch_states(stream)
            table.launches.queue(_group_settings(settings, self._device), stream)

    def _current_gradients(self) -> tuple[list[int], list[Tensor]]:
        """Addresses of the gradients, and those of them that are copies."""
        addresses, kept = [], []
        for parameter, _, _ in self._members:
            gradient = parameter.grad
            if gradient is None:
                addresses.append(_ABSENT)
                continue
            fitting = fitting_gradient(parameter)
            if fitting is not gradient:
                kept.append(fitting)
            addresses.append(fitting.data_ptr())
        return addresses, kept

    def _current_addresses(self) -> list[int]:
        """Of all states and then all values."""
        states = chain.from_iterable(self._states_of(member.state) for member in self._members)
        values = (member.parameter for member in self._members)
        return [tensor.data_ptr() for tensor in chain(states, values)]

    def _written_table(self, addresses: list[int], gradients: list[int], stream: int) -> _Table:
        if addresses != self._addresses:
            records = self._records(gradients)
            self._table = self._table or _Table(self._algorithm, self._members)
            self._table.launches.write(records, stream)
            self._addresses, self._gradients = addresses, gradients
        assert self._table is not None
        if gradients != self._gradients:
            self._table.launches.write_gradients(np.array(gradients, np.int64), stream)
            self._gradients = gradients
        return self._table

    def _captured_table(self, gradients: list[int], stream: int) -> _Table:
        if self._table is None:
            raise first_step_captured()
        table = _Table(self._algorithm, self._members)
        table.launches.write(self._records(gradients), stream)
        self._captured.append(table)
        return table

    def _records(self, gradients: list[int]) -> NDArray[np.int64]:
        """int64 (num_members, len(FIELDS)), after a look at every tensor."""
        from cupy_kernels.optimizer_8bit import FIELDS

        rows = []
        for member, gradient in zip(self._members, gradients, strict=True):
            check_member(member, self._device, self._dtype)
            row = {name: member.state[name].data_ptr() for name in self._names}
            row["count"] = member.parameter.numel()
            row["values"] = member.parameter.data_ptr()
            row["gradient"] = gradient
            row["group"] = member.group
            rows.append([row.get(field, _ABSENT) for field in FIELDS])
        return np.array(rows, np.int64)

    def _fetch_states(self, stream: int) -> None:
        from cupy_kernels.managed_memory import prefetch

        for member in self._members:
            if member.parameter.numel() >= SMALLEST_PAGED and member.parameter.grad is not None:
                for name in self._names:
                    if name.startswith("state"):
                        state = member.state[name]
                        prefetch(state.data_ptr(), state.nbytes, stream)


class _Table:
    """Device memory for a table of tensors, and the launches that read it."""

    def __init__(self, algorithm: Algorithm, members: Sequence[Member]) -> None:
        from cupy_kernels.optimizer_8bit import (
            RECORD_WORDS,
            OptimizerStep,
            TableMemory,
            UpdateKind,
        )

        first = members[0]
        device = first.parameter.device
        words = len(members) * (RECORD_WORDS + 1)
        self._memory = torch.empty(words, dtype=torch.int64, device=device)
        self._codes = _code_tables(device)
        address = self._memory.data_ptr()
        memory = TableMemory(
            records=address,
            firsts=address + 8 * RECORD_WORDS * len(members),
            codes=self._codes.data_ptr(),
            num_values=tuple(member.parameter.numel() for member in members),
        )
        kind = UpdateKind(algorithm, DTYPES[first.parameter.dtype], bits_of(first.state))
        self.launches: OptimizerStep = OptimizerStep(kind, memory)


@cache
def _code_tables(device: torch.device) -> Tensor:
    from cupy_kernels.optimizer_8bit import code_tables

    return torch.from_numpy(code_tables().view(np.int32)).to(device)


@cache
def check_device(device: torch.device) -> None:
    """Raise QtoolError unless our kernels run on this CUDA device."""
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_COMPUTE_CAPABILITY:
        versions = [".".join(map(str, version)) for version in (found, OLDEST_COMPUTE_CAPABILITY)]
        raise QtoolError(
            f"{device} has compute capability {versions[0]}; the kernels need {versions[1]}",
            kind="unsupported",
            hint="take an optimizer of torch.optim",
        )
    if find_spec("cupy") is None:
        raise QtoolError(
            f"parameters are on {device}, and CuPy, which the kernels need there, is not installed",
            kind="unsupported",
            hint=INSTALL_HINT,
        )


def _group_settings(
    settings: Sequence[Hyperparameters], device: torch.device
) -> list[GroupSettings]:
    from cupy_kernels.optimizer_8bit import GroupSettings

    groups = []
    for group in settings:
        rate, rate_at = group.learning_rate, 0
        if isinstance(rate, Tensor) and rate.device == device and rate.dtype == torch.float32:
            rate_at, rate = rate.data_ptr(), 0.0  # read on the device, by graphs too
        groups.append(
            GroupSettings(
                learning_rate=float(rate),
                beta1=group.beta1,
                beta2=group.beta2,
                epsilon=group.epsilon,
                weight_decay=group.weight_decay,
                learning_rate_at=rate_at,
            )
        )
    return groups
