"""Device memory: what a run took at its peak, and running out of it said as a sentence.

`allocated` is what PyTorch's allocator handed out; `device` is what the process took from the GPU:
the allocator's reserve, the CUDA context and libraries. Both 0 without a GPU. They are what plans
call `allocated_peak_bytes` and `peak_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

import torch

from qtool.errors import Option, QtoolError
from qtool.runtime import driver_memory

HOST_ALLOCATION_FAILED: Final = ("can't allocate memory", "DefaultCPUAllocator")

# How the memory of a process is known: the driver counts it; what the whole GPU uses more than
# before there was a context; the allocator's reserve alone, without context and libraries.
DeviceBasis = Literal["process", "gpu", "allocator"]


class DevicePeak(NamedTuple):
    """What a process took from its GPU at the peak; `basis` is None without a GPU."""

    num_bytes: int
    basis: DeviceBasis | None


class DeviceMemory:
    """Watches the GPU that a run computes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._used_before_bytes: int | None = None
        if self._device is not None:
            self._used_before_bytes = driver_memory.used_before_context(self._index)
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)

    def allocated_peak_bytes(self) -> int:
        """The allocator's peak since the start."""
        return torch.cuda.max_memory_allocated(self._device) if self._device is not None else 0

    def device_peak(self) -> DevicePeak:
        """The allocator's reserve at its peak, and what the process holds beside it now."""
        if self._device is None:
            return DevicePeak(0, None)
        reserved_peak = torch.cuda.max_memory_reserved(self._device)
        basis: DeviceBasis = "process"
        taken = driver_memory.process_bytes(self._index)
        if taken is None and self._used_before_bytes is not None:
            used = driver_memory.used_bytes(self._index)
            basis, taken = "gpu", None if used is None else used - self._used_before_bytes
        if taken is None:
            return DevicePeak(reserved_peak, "allocator")
        beside = taken - torch.cuda.memory_reserved(self._device)
        return DevicePeak(reserved_peak + max(beside, 0), basis)

    @property
    def _index(self) -> int:
        """The GPU's number, as CUDA counts."""
        assert self._device is not None
        return self._device.index or 0


@contextmanager
def out_of_memory_as_error(doing: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors, on the GPU or the host, into a QtoolError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QtoolError(
            f"out of GPU memory while {doing}: {str(error).partition('. ')[0]}",
            kind="memory",
            hint=(
                "`qtool estimate MODEL --gpu auto` shows what fits; try a smaller ",
                Option("quant"),
                ", a shorter context, or ",
                Option("max_memory", "0=SIZE,cpu=SIZE"),
                " to keep a part in host memory",
            ),
        ) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in HOST_ALLOCATION_FAILED):
            raise
        raise QtoolError(
            f"out of memory while {doing}",
            kind="memory",
            hint=("close other programs, or use a smaller ", Option("quant")),
        ) from error
