"""NVIDIA GPUs, MIG slices of them, and whether torch and CuPy can use them, as nvidia-smi says.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qtool.doctor.packages import installed_version
from qtool.doctor.records import Check

QUERY_FIELDS: Final = (
    "name,memory.total,memory.free,compute_cap,driver_version,uuid,mig.mode.current"
)
VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"
# Lines of `nvidia-smi -L`: a GPU, and the slices of it that follow.
LISTED_GPU: Final = re.compile(r"GPU (\d+): ")
LISTED_SLICE: Final = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")
# A row of the plain output's table of slices: GPU, two numbers of instances, slice; memory.
SLICE_MEMORY: Final = re.compile(
    r"^\|\s+(\d+)\s+\d+\s+\d+\s+(\d+)\s+\|\s+(\d+)MiB\s*/\s*(\d+)MiB", re.MULTILINE
)
NVIDIA_SMI_TIMEOUT_S: Final = 20  # without persistence mode each GPU takes seconds to wake up
MOSTLY_TAKEN: Final = 0.5  # of the memory: less free than this is worth a warning
CUPY_PACKAGES: Final = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
CUPY_LIBRARIES: Final = ("nvrtc",)  # compiles the kernels; CuPy brings the runtime itself


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a GPU that MIG divides: `profile` is its size, "3g.20gb".

    Memory is None where nvidia-smi's table does not show it.
    """

    profile: str
    uuid: str
    total_mib: int | None = None
    free_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi. Memory is None where the GPU has none of its own (GB10, Jetson).

    Of one that `is_divided` by MIG programs can have `slices`, and not the whole.
    """

    name: str
    total_mib: int | None
    free_mib: int | None
    compute_capability: str
    uuid: str = ""
    is_divided: bool = False
    slices: tuple[Slice, ...] = ()


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

    @property
    def free_mib(self) -> tuple[int, ...]:
        """What is free on each GPU or slice, where that is known."""
        parts = (gpu.slices if gpu.is_divided else (gpu,) for gpu in self.gpus)
        return tuple(it.free_mib for part in parts for it in part if it.free_mib is not None)


def ask_nvidia_smi() -> NvidiaSmi:
    """Run nvidia-smi; an empty record where there is none, never an exception."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return NvidiaSmi()
    query = f"--query-gpu={QUERY_FIELDS}"
    try:
        rows = _run(program, query, "--format=csv,noheader,nounits")
        smi = parse_nvidia_smi(rows, banner := _run(program))
        if any(gpu.is_divided for gpu in smi.gpus):
            return with_slices(smi, _run(program, "-L"), banner)
        return smi
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return NvidiaSmi(problem=_words_of(error))


def parse_nvidia_smi(rows: str, banner: str) -> NvidiaSmi:
    """The record from the query's CSV rows and the plain output, which alone names CUDA's version.

    Raises:
        ValueError: rows of another form.
    """
    gpus, driver = [], None
    for row in rows.strip().splitlines():
        name, total, free, capability, driver, uuid, mig = (f.strip() for f in row.split(","))
        gpus.append(Gpu(name, _mib(total), _mib(free), capability, uuid, mig == "Enabled"))
    cuda = re.search(r"CUDA Version:\s*(\d+\.\d+)", banner)
    return NvidiaSmi(tuple(gpus), driver, cuda.group(1) if cuda else None)


def with_slices(smi: NvidiaSmi, listing: str, banner: str) -> NvidiaSmi:
    """The same with the MIG slices of `nvidia-smi -L`, and their memory from the plain output."""
    memory = {
        (int(gpu), int(device)): (int(total), int(total) - int(used))
        for gpu, device, used, total in SLICE_MEMORY.findall(banner)
    }
    slices: dict[int, list[Slice]] = {}
    number = -1
    for line in listing.splitlines():
        if match := LISTED_GPU.match(line):
            number = int(match[1])
        elif match := LISTED_SLICE.match(line):
            total, free = memory.get((number, int(match[2])), (None, None))
            slices.setdefault(number, []).append(Slice(match[1], match[3], total, free))
    gpus = (replace(g, slices=tuple(slices.get(index, ()))) for index, g in enumerate(smi.gpus))
    return replace(smi, gpus=tuple(gpus))


def check_gpus(smi: NvidiaSmi) -> Iterator[Check]:
    """Driver and GPUs, how much of their memory others hold, and which of them programs see."""
    if smi.problem is not None:
        fix = "reboot after a driver update; in a container, start it with --gpus all"
        yield Check("driver", "fail", f"nvidia-smi fails: {smi.problem}", fix)
        return
    if not smi.gpus:
        fix = "for an NVIDIA GPU install its driver; in a container, start it with --gpus all"
        found = "no NVIDIA driver was found: everything runs on the CPU"
        yield Check("gpu", "info", found, fix)
        return
    yield Check("driver", "ok", f"{smi.driver}, supports CUDA {smi.cuda or 'unknown'}")
    for index, gpu in enumerate(smi.gpus):
        if gpu.is_divided:
            yield from _check_slices(f"gpu {index}", gpu)
        else:
            yield _check_gpu(f"gpu {index}", gpu)
    yield from check_visible_devices(smi)


def _check_slices(name: str, gpu: Gpu) -> Iterator[Check]:
    if not gpu.slices:
        fix = (
            "as root: nvidia-smi mig -lgip lists profiles, nvidia-smi mig -cgi PROFILE -C makes one"
        )
        found = f"{gpu.name}: MIG is on and there is no slice, so that no program can use it"
        yield Check(name, "warn", found, fix)
        return
    count = f"{len(gpu.slices)} slice{'s' * (len(gpu.slices) != 1)}"
    found = f"{gpu.name}: MIG divides it into {count}, compute capability {gpu.compute_capability}"
    yield Check(name, "ok", found)
    for number, part in enumerate(gpu.slices):
        yield _check_memory(f"{name} mig {number}", part.profile, part, f", {part.uuid}")


def check_visible_devices(smi: NvidiaSmi) -> Iterator[Check]:
    """What CUDA_VISIBLE_DEVICES leaves of them; if it is not set, that MIG leaves one slice."""
    name, asked = "visible devices", os.environ.get(VISIBLE_DEVICES)
    slices = {part.uuid: part for gpu in smi.gpus for part in gpu.slices}
    if asked is None:
        if slices:
            found = f"{VISIBLE_DEVICES} is not set: a program sees one slice"
            first = next(iter(slices))
            yield Check(name, "info", found, f"{VISIBLE_DEVICES}={first} chooses it by its UUID")
        return
    entries = [entry.strip() for entry in asked.split(",")]
    seen, unknown = [], None
    for entry in entries:
        found_device = _device_named(entry, smi, slices)
        if found_device is None:
            unknown = entry
            break
        seen.append(found_device)
    known = ", ".join([*map(str, range(len(smi.gpus))), *slices])
    fix = f"unset it, or name some of {known}"
    if not seen:
        found = f"{VISIBLE_DEVICES}={asked} names no GPU here, so that programs see none"
        yield Check(name, "warn", found, fix)
    elif unknown is not None:
        found = f"{VISIBLE_DEVICES}: {unknown} is no GPU here, and CUDA leaves it and the rest out"
        yield Check(name, "warn", found, fix)
    elif len(seen) > 1 and any(entry.startswith("MIG-") for entry in entries):
        found = f"{VISIBLE_DEVICES} names {len(seen)} devices, but CUDA uses one slice at a time"
        yield Check(name, "warn", found, f"{VISIBLE_DEVICES}={entries[0]}")
    else:
        yield Check(name, "ok", f"{', '.join(seen)} ({VISIBLE_DEVICES})")


def _device_named(entry: str, smi: NvidiaSmi, slices: Mapping[str, Slice]) -> str | None:
    """A device by its number or the start of its UUID, in words; None where there is none."""
    if entry.isdigit():
        return f"GPU {int(entry)}" if int(entry) < len(smi.gpus) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    gpus = {gpu.uuid: gpu.name for gpu in smi.gpus}
    named = gpus | {uuid: f"MIG {part.profile}" for uuid, part in slices.items()}
    found = [uuid for uuid in named if uuid.startswith(entry)]
    return named[found[0]] if len(found) == 1 else None


def _check_gpu(name: str, gpu: Gpu) -> Check:
    capability = f", compute capability {gpu.compute_capability}"
    if gpu.total_mib is None or gpu.free_mib is None:
        return Check(name, "ok", f"{gpu.name}: shares the host's memory{capability}")
    return _check_memory(name, gpu.name, gpu, capability)


def _check_memory(name: str, what: str, device: Gpu | Slice, more: str) -> Check:
    total, free = device.total_mib, device.free_mib
    if total is None or free is None:
        return Check(name, "ok", f"{what}{more}")
    found = f"{what}: {free:,} MiB free of {total:,} MiB{more}"
    if free >= MOSTLY_TAKEN * total:
        return Check(name, "ok", found)
    fix = "another process holds the rest (nvidia-smi lists it): stop it"
    return Check(name, "warn", found, f"{fix}, or choose a GPU with {VISIBLE_DEVICES}")


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
        fix = f"for the kernels of the GPU: pip install {_cupy_extra(smi)}" if smi.gpus else ""
        yield Check("cupy", "info", "not installed; the CPU kernels do the work", fix)
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
