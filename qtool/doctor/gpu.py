"""NVIDIA GPUs as nvidia-smi reports them, and whether torch and CuPy can use them.

torch's build is read from its version.py and CuPy's libraries are looked for as files: neither
package is imported. Memory is MiB as nvidia-smi counts it (2^20 bytes).
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qtool.doctor.packages import installed_version
from qtool.doctor.records import Check

NVIDIA_SMI_TIMEOUT_S: Final = 20  # without persistence mode each GPU takes seconds to wake up
MOSTLY_TAKEN: Final = 0.5  # of the memory: less free than this is worth a warning
CUPY_PACKAGES: Final = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
CUPY_LIBRARIES: Final = ("nvrtc",)  # compiles the kernels; CuPy brings the runtime itself


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi. Memory is None where the GPU has none of its own (GB10, Jetson)."""

    name: str
    total_mib: int | None
    free_mib: int | None
    compute_capability: str


@dataclass(frozen=True, slots=True)
class NvidiaSmi:
    """What nvidia-smi said. `problem` is set where it is there but does not work."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA that the driver supports, "13.0"
    problem: str | None = None

    @property
    def cuda_major(self) -> int | None:
        """12 or 13; None where unknown."""
        return int(self.cuda.partition(".")[0]) if self.cuda else None


def ask_nvidia_smi() -> NvidiaSmi:
    """Run nvidia-smi; an empty record where there is none, never an exception."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return NvidiaSmi()
    query = "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version"
    try:
        rows = _run(program, query, "--format=csv,noheader,nounits")
        return parse_nvidia_smi(rows, _run(program))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return NvidiaSmi(problem=_words_of(error))


def parse_nvidia_smi(rows: str, banner: str) -> NvidiaSmi:
    """The record from the query's CSV rows and the plain output, which alone names CUDA's version.

    Raises:
        ValueError: rows of another form.
    """
    gpus, driver = [], None
    for row in rows.strip().splitlines():
        name, total, free, capability, driver = (field.strip() for field in row.split(","))
        gpus.append(Gpu(name, _mib(total), _mib(free), capability))
    cuda = re.search(r"CUDA Version:\s*(\d+\.\d+)", banner)
    return NvidiaSmi(tuple(gpus), driver, cuda.group(1) if cuda else None)


def check_gpus(smi: NvidiaSmi) -> Iterator[Check]:
    """Driver and GPUs, and how much of their memory others hold."""
    if smi.problem is not None:
        fix = "reboot after a driver update; in a container, start it with --gpus all"
        yield Check("driver", "fail", f"nvidia-smi fails: {smi.problem}", fix)
        return
    if not smi.gpus:
        yield Check("gpu", "info", "no NVIDIA driver found: everything runs on the CPU")
        return
    yield Check("driver", "ok", f"{smi.driver}, supports CUDA {smi.cuda or 'unknown'}")
    for index, gpu in enumerate(smi.gpus):
        yield _check_gpu(f"gpu {index}", gpu)


def _check_gpu(name: str, gpu: Gpu) -> Check:
    capability = f"compute capability {gpu.compute_capability}"
    if gpu.total_mib is None or gpu.free_mib is None:
        return Check(name, "ok", f"{gpu.name}: shares the host's memory, {capability}")
    memory = f"{gpu.free_mib:,} MiB free of {gpu.total_mib:,} MiB"
    found = f"{gpu.name}: {memory}, {capability}"
    if gpu.free_mib >= MOSTLY_TAKEN * gpu.total_mib:
        return Check(name, "ok", found)
    fix = "another process holds the rest (nvidia-smi lists it): stop it"
    return Check(name, "warn", found, f"{fix}, or choose a GPU with CUDA_VISIBLE_DEVICES")


def check_torch_build(smi: NvidiaSmi) -> Iterator[Check]:
    """Whether the installed torch can use the GPU that is there."""
    if not smi.gpus or installed_version("torch") is None:
        return
    cuda = torch_cuda_version()
    if cuda is None:
        yield Check(
            "torch build", "warn", "built for CPUs only: generate will not use the GPU",
            f"pip install --force-reinstall torch --index-url {torch_index(smi)}",
        )  # fmt: skip
    elif smi.cuda_major is not None and int(cuda.partition(".")[0]) > smi.cuda_major:
        yield Check(
            "torch build", "warn", f"built for CUDA {cuda}, the driver supports {smi.cuda}",
            f"update the driver, or pip install --force-reinstall torch "
            f"--index-url {torch_index(smi)}",
        )  # fmt: skip
    else:
        yield Check("torch build", "ok", f"CUDA {cuda}")


def torch_cuda_version() -> str | None:
    """The CUDA version in torch's own version.py; None for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match.group(1) if match else None


def torch_index(smi: NvidiaSmi) -> str:
    """The package index of the torch builds that this driver runs."""
    build = "cu130" if (smi.cuda_major or 0) >= 13 else "cu126"
    return f"https://download.pytorch.org/whl/{build}"


def check_cupy(smi: NvidiaSmi) -> Iterator[Check]:
    """One CuPy, made for a CUDA that the driver supports, with the CUDA libraries it loads."""
    installed = [name for name in CUPY_PACKAGES if installed_version(name)]
    if not installed:
        yield Check("cupy", "info", "not installed; the CPU kernels do the work")
        return
    if len(installed) > 1:
        fix = f"pip uninstall -y {' '.join(installed)}; pip install {_cupy_extra(smi)}"
        yield Check("cupy", "fail", f"{' and '.join(installed)} are both installed", fix)
        return
    package = installed[0]
    major = int(digits.group(1)) if (digits := re.search(r"cuda(\d+)x", package)) else None
    yield _check_cupy_driver(package, major, smi)
    missing = [name for name in CUPY_LIBRARIES if find_cuda_library(name, major) is None]
    if missing:
        found = f"not found: {', '.join(f'lib{name}.so' for name in missing)}"
        fix = f"pip install {_cupy_extra(smi)}, or set CUDA_PATH"
        yield Check("cuda libraries", "fail", found, fix)
    else:
        yield Check("cuda libraries", "ok", ", ".join(f"lib{name}" for name in CUPY_LIBRARIES))


def find_cuda_library(name: str, major: int | None) -> Path | None:
    """Where `libNAME.so.MAJOR` lies: NVIDIA's pip packages, CUDA_PATH, the system's loader."""
    pattern = f"lib{name}.so.{major}*" if major else f"lib{name}.so*"
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    toolkit = Path(os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    folders = [*sorted(packages.glob("*/lib")), toolkit / "lib64", toolkit / "lib"]
    found = next((path for folder in folders for path in sorted(folder.glob(pattern))), None)
    if found is None and (loaded := ctypes.util.find_library(name)):
        suffix = loaded.rpartition(".so.")[2]
        if major is None or suffix.partition(".")[0] == str(major):
            return Path(loaded)
    return found


def _check_cupy_driver(package: str, major: int | None, smi: NvidiaSmi) -> Check:
    found = f"{package} {installed_version(package)}"
    if not smi.gpus:
        return Check("cupy", "info", f"{found}, but no GPU to use it on")
    if major and smi.cuda_major and major > smi.cuda_major:
        fix = f"pip uninstall -y {package}; pip install {_cupy_extra(smi)}"
        return Check("cupy", "fail", f"{found}, the driver supports CUDA {smi.cuda}", fix)
    return Check("cupy", "ok", found)


def _mib(text: str) -> int | None:
    return None if text.startswith("[") else int(text)  # "[N/A]"


def _cupy_extra(smi: NvidiaSmi) -> str:
    return '"qtool[cuda13]"' if (smi.cuda_major or 12) >= 13 else '"qtool[cuda12]"'


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
    )
    return done.stdout


def _words_of(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
    return f"{type(error).__name__}: {error}"
