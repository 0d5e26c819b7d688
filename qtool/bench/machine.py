"""Where a measurement was made: the parts of the machine, and the versions of all software."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import qtool
from qtool.doctor.gpu import ask_nvidia_smi
from qtool.doctor.machine import (
    CPUINFO,
    available_memory_bytes,
    read_cpu_features,
    usable_cores,
)
from qtool.doctor.packages import installed_version


def describe_host() -> dict[str, Any]:
    """Processor, cores, memory and system, as fields of the JSON document."""
    cpu, features = read_cpu_features(CPUINFO.read_text())
    return {
        "cpu": cpu,
        "cpu_features": list(features),
        "cores": usable_cores()[0],
        "memory_bytes": available_memory_bytes()[1],
        "system": platform.platform(),
    }


def device_name(num_threads: int, *, on_gpu: bool) -> str:
    """What the kernels run on: the GPU's name, or the processor's and how many threads."""
    if on_gpu:
        from qtool.backends.cuda_driver import find_cuda_device

        return find_cuda_device().name
    name, _ = read_cpu_features(CPUINFO.read_text())
    return f"{name}, {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def software_versions(*, on_gpu: bool, rivals: Sequence[str] = ()) -> dict[str, str]:
    """Of Python, qtool, what its kernels need there, and those of `rivals` that are installed."""
    own = ("numpy", "cupy") if on_gpu else ("numpy", "numba", "llvmlite")
    found = package_versions(*own, *rivals)
    return found | _cuda_versions() if on_gpu else found


def package_versions(*packages: str) -> dict[str, str]:
    """Python, qtool and those of `packages` that are there.

    A loaded module's own word comes first: it may have come without metadata.
    """
    found = {"python": platform.python_version(), "qtool": qtool.__version__}
    for package in packages:
        loaded = getattr(sys.modules.get(package), "__version__", None)
        version = loaded or installed_version(package)
        if version:
            found[package] = str(version)
    return found


def _cuda_versions() -> dict[str, str]:
    """The driver, and the compiler of the kernels; models run without the latter, too."""
    found = {}
    if find_spec("cupy") is not None:
        from cupy.cuda import nvrtc

        found["nvrtc"] = ".".join(map(str, nvrtc.getVersion()))
    if driver := ask_nvidia_smi().driver:
        found["nvidia_driver"] = driver
    return found
