"""Which backend is taken, and what is said where it cannot be the GPU."""

from __future__ import annotations

import pytest

from qtool.backends import choose_backend, cuda_driver
from qtool.errors import QtoolError


class FakeDriver:
    """libcuda with one GPU, or none, or one that fails."""

    def __init__(self, compute_capability=(9, 0), num_devices=1, status=0):
        self.values = {75: compute_capability[0], 76: compute_capability[1]}
        self.num_devices = num_devices
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.num_devices
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = b"NVIDIA Test"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.values[attribute]
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"unknown error"
        return 0


def use_driver(monkeypatch, driver, cupy_is_installed=True):
    def load(name):
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", load)
    spec = object() if cupy_is_installed else None
    monkeypatch.setattr(cuda_driver.importlib.util, "find_spec", lambda name: spec)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    use_driver(monkeypatch, FakeDriver())
    chosen = choose_backend("auto")
    assert chosen.backend.name == "cuda"
    assert chosen.reason == "auto: it has a GPU (NVIDIA Test)"


WITHOUT_GPU = [
    (None, True, "no NVIDIA driver was found"),
    (FakeDriver(num_devices=0), True, "the NVIDIA driver sees no GPU"),
    (FakeDriver((7, 0)), True, "NVIDIA Test has compute capability 7.0, the kernels need 7.5"),
    (FakeDriver(status=999), True, "the NVIDIA driver does not work: unknown error"),
    (FakeDriver(), False, "NVIDIA Test is there, CuPy is not installed"),
]


@pytest.mark.parametrize(("driver", "cupy_is_installed", "reason"), WITHOUT_GPU)
def test_the_cpu_is_taken_otherwise_and_the_reason_said(
    driver, cupy_is_installed, reason, monkeypatch
):
    use_driver(monkeypatch, driver, cupy_is_installed)
    chosen = choose_backend("auto")
    assert chosen.backend.name == "cpu"
    assert chosen.reason.startswith(f"auto: {reason}")


@pytest.mark.parametrize(("driver", "cupy_is_installed", "reason"), WITHOUT_GPU)
def test_asking_for_the_gpu_in_vain_is_an_error(driver, cupy_is_installed, reason, monkeypatch):
    use_driver(monkeypatch, driver, cupy_is_installed)
    with pytest.raises(QtoolError) as caught:
        choose_backend("cuda")
    assert caught.value.kind == "unsupported"
    assert caught.value.message.startswith(f"backend='cuda' cannot run here: {reason}")
    assert caught.value.hint


def test_the_cpu_asked_for_is_taken_without_a_look_at_the_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "find_cuda_device", None)
    chosen = choose_backend("cpu")
    assert chosen.backend.name == "cpu" and chosen.reason.startswith("asked for")


def test_turing_is_new_enough(monkeypatch):
    use_driver(monkeypatch, FakeDriver((7, 5)))
    assert cuda_driver.find_cuda_device().compute_capability == (7, 5)
