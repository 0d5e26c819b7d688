"""Processor, memory and disk, from /proc, cgroups and the file system. Linux only."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qtool.doctor.hub import hub_home
from qtool.doctor.records import Check

GIB: Final = 1 << 30

# What the kernels use where it is there, in /proc/cpuinfo's words and as people write it.
X86_FEATURES: Final = {
    "avx2": "AVX2",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX",
}
ARM_FEATURES: Final = {
    "asimd": "NEON",
    "asimdhp": "NEON fp16",
    "asimddp": "dot product",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
}
BASELINE_FEATURES: Final = ("AVX2", "NEON")

# quantize stays below 0.6 GiB whatever the model; a smaller machine would swap.
ENOUGH_MEMORY_BYTES: Final = 2 * GIB
# A 4-bit 8-billion-parameter checkpoint is 5 GiB, its bf16 source 15 GiB.
ENOUGH_DISK_BYTES: Final = 20 * GIB

CPUINFO: Final = Path("/proc/cpuinfo")
MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/sys/fs/cgroup")


def check_cpu() -> Iterator[Check]:
    """Model, vector features and how many cores this process may use."""
    model, features = read_cpu_features(CPUINFO.read_text())
    found = f"{model}: {', '.join(features) or 'no vector features found'}"
    if any(feature in BASELINE_FEATURES for feature in features):
        yield Check("cpu", "ok", found)
    else:
        yield Check("cpu", "warn", found, "works, but slowly: use a CPU with AVX2 or NEON")
    yield _check_cores()


def read_cpu_features(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """The model name and the known features in the text of /proc/cpuinfo (x86 or arm64)."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    known = X86_FEATURES | ARM_FEATURES
    features = tuple(text for word, text in known.items() if word in words)
    return (name.group(1).strip() if name else platform.machine()), features


def usable_cores() -> tuple[float, str]:
    """Cores this process may use, and what limits them ("" where nothing does)."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = CGROUP / "cpu.max"  # "max 100000", or "QUOTA PERIOD" in microseconds
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota != "max" and int(quota) / int(period) < cores:
            return int(quota) / int(period), "container limit"
    return cores, "" if cores == os.cpu_count() else "CPU affinity"


def _check_cores() -> Check:
    cores, limited_by = usable_cores()
    found = f"{cores:g} usable of {os.cpu_count()}" + (f" ({limited_by})" if limited_by else "")
    variables = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
    chosen = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]
    return Check("cores", "ok", ", ".join([found, *chosen]))


def check_memory() -> Iterator[Check]:
    """Memory that a new process can have, a container's limit included."""
    available, total = available_memory_bytes()
    found = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    if available < ENOUGH_MEMORY_BYTES:
        fix = "close other programs; quantize needs about 0.6 GiB, generate the whole model"
        yield Check("memory", "warn", found, fix)
    else:
        yield Check("memory", "ok", found)


def available_memory_bytes() -> tuple[int, int]:
    """(available, total) host memory in bytes."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE))
    available, total = int(fields["MemAvailable"]) << 10, int(fields["MemTotal"]) << 10
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available, total


def check_disk() -> Iterator[Check]:
    """Free space where downloads and outputs go."""
    yield check_free_space("disk, HF_HOME", hub_home(), "set HF_HOME to a larger disk")
    yield check_free_space("disk, here", Path.cwd(), "write with -o to a larger disk")


def check_free_space(name: str, folder: Path, fix: str) -> Check:
    """Free bytes on the file system of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if not os.access(existing, os.W_OK):
        return Check(name, "warn", f"{found}, not writable", fix)
    if free < ENOUGH_DISK_BYTES:
        return Check(name, "warn", found, f"free some space, or {fix}")
    return Check(name, "ok", found)
