"""Is there a GPU that the CUDA kernels can use? Asked of the driver alone, without CuPy."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cupy_kernels import OLDEST_COMPUTE_CAPABILITY
from qtool.errors import Option, QtoolError

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
SEE_DOCTOR = "see `qtool doctor`"
INSTALL_HINT = "pip install 'qtool[cuda13]' (driver 580 or newer) or 'qtool[cuda12]'"


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """The first visible GPU."""

    name: str
    compute_capability: tuple[int, int]


class NoCudaError(Exception):
    """Why the CUDA kernels cannot run here; `fix` is what to do about it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def cannot_run(asked: Option, reason: str, fix: str = SEE_DOCTOR) -> QtoolError:
    """The error for a GPU that was asked for, by whichever option, and that cannot be had here."""
    return QtoolError(
        (asked, f" cannot run here: {reason}"),
        kind="unsupported",
        hint=(f"{fix}, or use ", Option(asked.name, "cpu")),
    )


def find_driver() -> None:
    """Only whether there is one: starts nothing.

    Raises:
        NoCudaError: no driver.
    """
    _load_driver()


def find_gpu() -> CudaDevice:
    """The first GPU that the driver sees, whatever it can do.

    Raises:
        NoCudaError: no driver, no GPU.
    """
    return _first_device(_load_driver())


def find_cuda_device() -> CudaDevice:
    """The GPU that the CUDA backend would use.

    Raises:
        NoCudaError: no driver, no GPU, one that is too old, or no CuPy.
    """
    device = find_gpu()
    if device.compute_capability < OLDEST_COMPUTE_CAPABILITY:
        found, oldest = (
            ".".join(map(str, version))
            for version in (device.compute_capability, OLDEST_COMPUTE_CAPABILITY)
        )
        raise NoCudaError(
            f"{device.name} has compute capability {found}, the kernels need {oldest} (Turing)",
            fix="use a newer GPU",
        )
    if importlib.util.find_spec("cupy") is None:
        raise NoCudaError(f"{device.name} is there, CuPy is not installed", fix=INSTALL_HINT)
    return device


def open_in_background() -> None:
    """Begin to make the device's context and to load CuPy, if there is a device.

    Most of that is waiting, in which other modules can be imported. Whoever needs it waits for what
    is left, and meets the errors, which are not told here.
    """
    threading.Thread(target=_open, name="open-cuda", daemon=True).start()


def _open() -> None:
    with contextlib.suppress(Exception):
        find_cuda_device()
        # The driver makes the context that CuPy will find, without holding up Python meanwhile.
        driver, context = _load_driver(), ctypes.c_void_p()
        _call(driver, driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), 0)
        importlib.import_module("cupy")


def _load_driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoCudaError("no NVIDIA driver was found", fix="install the driver") from None


def _first_device(driver: ctypes.CDLL) -> CudaDevice:
    count, device = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(driver, driver.cuInit, 0)
    _call(driver, driver.cuDeviceGetCount, ctypes.byref(count))
    if count.value == 0:
        raise NoCudaError("the NVIDIA driver sees no GPU", fix="check CUDA_VISIBLE_DEVICES")
    _call(driver, driver.cuDeviceGet, ctypes.byref(device), 0)
    _call(driver, driver.cuDeviceGetName, name, len(name), device)
    for attribute, value in (
        (_COMPUTE_CAPABILITY_MAJOR, major),
        (_COMPUTE_CAPABILITY_MINOR, minor),
    ):
        _call(driver, driver.cuDeviceGetAttribute, ctypes.byref(value), attribute, device)
    return CudaDevice(name.value.decode(errors="replace"), (major.value, minor.value))


def _call(driver: ctypes.CDLL, function: Callable[..., int], *arguments: Any) -> None:
    status = function(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        what = text.value.decode() if text.value else f"error {status}"
        raise NoCudaError(f"the NVIDIA driver does not work: {what}", fix=SEE_DOCTOR)
