"""What a run took from a GPU, with a driver and an allocator that are stand-ins."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.runtime import driver_memory
from qtool.runtime.memory import DeviceMemory, DevicePeak

GIB = 1 << 30


class Driver:
    """libcuda and libnvidia-ml at once: one GPU, which CUDA counts as 0 and NVML by its UUID."""

    uuid = bytes(range(16))

    def __init__(self) -> None:
        self.used = 10 * GIB
        self.processes: list[tuple[int, int]] = []
        self.has_context = False
        self.name = b"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
        self.error = 0

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return int(index != 0)

    def cuDeviceGetUuid_v2(self, number: Any, device: Any) -> int:
        number._obj[:] = list(self.uuid)
        return 0

    def cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, active: Any) -> int:
        active._obj.value = self.has_context
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        return int(name != self.name)

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        memory._obj.used = self.used
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, found: Any) -> int:
        count._obj.value = len(self.processes)
        for entry, (pid, used) in zip(found, self.processes, strict=False):
            entry.pid, entry.used = pid, used
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(driver_memory, "_before", {})
    namespace = tmp_path / "pid"
    namespace.symlink_to(driver_memory.FIRST_NAMESPACE)
    monkeypatch.setattr(driver_memory, "NAMESPACE", namespace)
    return made


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What PyTorch's allocator says."""
    said = {"now": 5 * GIB, "peak": 7 * GIB}
    monkeypatch.setattr(torch.cuda, "init", lambda: said.update(initialized=1))
    # Which PyTorch refuses before.
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: said.__getitem__("initialized")
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: said["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: said["peak"])
    return said


GPU = torch.device("cuda", 0)


def test_the_driver_counts_this_process(driver: Driver, reserved: dict[str, int]) -> None:
    """The context lies beside the reserve, whatever others do meanwhile."""
    memory = DeviceMemory(GPU)
    driver.used += 40 * GIB
    driver.processes = [(1, 9 * GIB), (os.getpid(), 6 * GIB)]
    assert memory.device_peak() == DevicePeak(8 * GIB, "process")


def test_what_the_gpu_uses_more_than_before_a_context(
    driver: Driver, reserved: dict[str, int]
) -> None:
    """In a container the driver names other processes, or none."""
    assert driver_memory.used_before_context(0) == 10 * GIB  # as `head_start` asks
    driver.has_context = True
    driver.used = 11 * GIB
    memory = DeviceMemory(GPU)
    driver.used = 16 * GIB
    driver.processes = [(1, 6 * GIB)]
    assert memory.device_peak() == DevicePeak(8 * GIB, "gpu")
    driver_memory.NAMESPACE.unlink()
    driver.processes = [(os.getpid(), 1)]  # another process, of the machine's numbers
    assert memory.device_peak() == DevicePeak(8 * GIB, "gpu")


def test_a_context_that_was_there_already_is_not_called_the_memory_before(
    driver: Driver, reserved: dict[str, int]
) -> None:
    driver.has_context = True
    memory = DeviceMemory(GPU)
    assert memory.device_peak() == DevicePeak(7 * GIB, "allocator")


def test_a_slice_is_found_by_its_uuid(driver: Driver) -> None:
    driver.name = driver.name.replace(b"GPU", b"MIG")
    assert driver_memory.used_bytes(0) == 10 * GIB
    driver.name = b"GPU-another"
    assert driver_memory.used_bytes(0) is None


def test_numbers_that_are_not_available_are_none(driver: Driver) -> None:
    driver.processes = [(os.getpid(), driver_memory.NOT_AVAILABLE)]
    assert driver_memory.process_bytes(0) is None


@pytest.mark.parametrize("index", [0, 1])
def test_without_a_driver_nothing_is_known_and_nothing_fails(
    driver: Driver, reserved: dict[str, int], monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: no such file")

    if index == 0:
        monkeypatch.setattr(ctypes, "CDLL", missing)
    memory = DeviceMemory(torch.device("cuda", index))
    assert memory.device_peak() == DevicePeak(7 * GIB, "allocator")


def test_on_the_cpu_there_is_nothing_to_count() -> None:
    assert DeviceMemory(torch.device("cpu")).device_peak() == DevicePeak(0, None)
