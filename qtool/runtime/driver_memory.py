"""GPU memory as the driver counts it: of a whole GPU, and of this process. Never raises.

Asks NVML and the CUDA driver through ctypes, and makes no context. Imports only what is light, for
`head_start` asks before all else.
"""

from __future__ import annotations

import ctypes
import os
import threading
import uuid
from pathlib import Path
from typing import Any, Final

MOST_PROCESSES: Final = 1024
NOT_AVAILABLE: Final = (1 << 64) - 1
# Where process numbers are those of the machine: the kernel's number of its first namespace.
FIRST_NAMESPACE: Final = "pid:[4026531836]"
NAMESPACE: Final = Path("/proc/self/ns/pid")

_lock = threading.Lock()
_before: dict[int, int | None] = {}


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def used_before_context(index: int) -> int | None:
    """Bytes in use on GPU `index`, as CUDA counts, before this process had a context there.

    Asked for the first time it looks, and remembers; None where there was a context already then,
    or the driver does not say.
    """
    with _lock:
        if index not in _before:
            _before[index] = None if _has_context(index) else used_bytes(index)
        return _before[index]


def used_bytes(index: int) -> int | None:
    """Bytes in use on the whole GPU, by anyone."""
    found = _nvml_device(index)
    if found is None:
        return None
    nvml, device = found
    memory = _Memory()
    failed = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    return None if failed else int(memory.used)


def process_bytes(index: int) -> int | None:
    """Bytes that this process has taken from the GPU, its context among them.

    None where the driver does not say, as in containers: process numbers are others there.
    """
    found = _nvml_device(index) if _has_numbers_of_the_machine() else None
    if found is None:
        return None
    nvml, device = found
    processes = (_Process * MOST_PROCESSES)()
    count = ctypes.c_uint(MOST_PROCESSES)
    ask = getattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", None)
    if ask is None or ask(device, ctypes.byref(count), processes):
        return None
    own = [it.used for it in processes[: count.value] if it.pid == os.getpid()]
    return int(own[0]) if own and own[0] != NOT_AVAILABLE else None


def _has_numbers_of_the_machine() -> bool:
    try:
        return str(NAMESPACE.readlink()) == FIRST_NAMESPACE
    except OSError:
        return False


def _has_context(index: int) -> bool:
    """Whether this process has one there; also where that is not known."""
    try:
        driver, device = _driver_device(index)
        flags, active = ctypes.c_uint(), ctypes.c_int()
        failed = driver.cuDevicePrimaryCtxGetState(
            device, ctypes.byref(flags), ctypes.byref(active)
        )
        return bool(failed or active.value)
    except (OSError, AttributeError):
        return True


def _driver_device(index: int) -> tuple[Any, ctypes.c_int]:
    """The driver and its device; OSError where there is none."""
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        raise OSError(f"no GPU {index}")
    return driver, device


def _nvml_device(index: int) -> tuple[Any, ctypes.c_void_p] | None:
    """NVML and its handle of the GPU or MIG slice, which it counts in another order than CUDA."""
    try:
        driver, device = _driver_device(index)
        number = (ctypes.c_ubyte * 16)()
        ask = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
        if ask(ctypes.byref(number), device):
            return None
        nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        if nvml.nvmlInit_v2():
            return None
        for kind in ("GPU", "MIG"):
            name = f"{kind}-{uuid.UUID(bytes=bytes(number))}".encode()
            if not nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
                return nvml, handle
        return None
    except (OSError, AttributeError):
        return None
