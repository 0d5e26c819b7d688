"""Device memory: what a run took at its peak, and running out of it said as a sentence.

`allocated` is what PyTorch's allocator handed out; `device` is what the process took from the GPU:
the allocator's reserve, the CUDA context and libraries. Both 0 without a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from qtool.errors import Option, QtoolError

HOST_ALLOCATION_FAILED: Final = ("can't allocate memory", "DefaultCPUAllocator")


class DeviceMemory:
    """Watches the GPU that a run computes on; made before the process's CUDA context is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._used_before_bytes: int | None = None
        if self._device is not None:
            if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self._used_before_bytes = _used_bytes_by_driver(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def allocated_peak_bytes(self) -> int:
        """The allocator's peak since the start."""
        return torch.cuda.max_memory_allocated(self._device) if self._device is not None else 0

    def device_peak_bytes(self) -> int:
        """The allocator's reserve at its peak, and what the process holds beside it.

        The rest is what the GPU uses more than before the process's CUDA context was made; where
        that is not known, only the reserve is counted.
        """
        if self._device is None:
            return 0
        reserved_peak = torch.cuda.max_memory_reserved(self._device)
        if self._used_before_bytes is None:
            return reserved_peak
        used_now = _used_bytes_by_driver(self._device)
        reserved_now = torch.cuda.memory_reserved(self._device)
        beside = (used_now or 0) - self._used_before_bytes - reserved_now
        return reserved_peak + max(beside, 0)


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


class _NvmlMemory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _used_bytes_by_driver(device: torch.device) -> int | None:
    """Memory in use on the whole GPU, asked of the driver without making a CUDA context."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        failed = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return None if failed else int(memory.used)
    except (OSError, AttributeError, RuntimeError):
        return None
