"""From a .cu file to a kernel that can be launched: assembly, compilation, cache.

    kernel = load_kernel("quantize_4bit", SOURCE="Bf16", QUANT_TYPE="Nf4", BLOCKSIZE=64)

Every specialisation is a program of its own, so that only what a run needs is compiled. The machine
code is kept on disk, under a name that depends on all that it was made from, and loaded once per
device. Compiling needs no GPU and no CUDA headers, only NVRTC.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cupy_kernels.code_tables import code_tables_header

if TYPE_CHECKING:
    import cupy

SOURCES: Final = Path(__file__).parent
# Subnormals are zero and products are not fused into sums: the rounding that the formats prescribe.
COMPILE_OPTIONS: Final = (
    "--std=c++17",
    "--ftz=true",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ptxas-options=-v",
)

Defines = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code (or PTX), and what the compiler said: registers, spills."""

    image: bytes
    log: str


def load_kernel(name: str, *, cooperative: bool = False, **defines: str | int) -> cupy.RawKernel:
    """The kernel `name` of NAME.cu for the current device.

    Args:
        cooperative: its blocks wait for each other, so all of them must be resident.
        defines: the macros that specialise it.

    Raises:
        CompileError: NVRTC refuses the source.
    """
    return _load(name, tuple(defines.items()), cooperative, _target())


def load_kernel_of_one_architecture(name: str, **defines: str | int) -> cupy.RawKernel:
    """`load_kernel` where instructions are used that later GPUs do not have: for sm_90a, say."""
    return _load(name, tuple(defines.items()), False, f"{_target()}a")


def compiles_for(target: str) -> bool:
    """Whether kernels of the current device are compiled for `target`."""
    return _target() == target


def kernels_wait() -> bool:
    """Whether kernels of the current device are compiled with the instruction to wait for what the
    launch before writes, which is Hopper's and later."""
    return int(_target().rpartition("_")[2]) >= 90


def compile_kernel(name: str, defines: Defines, target: str) -> Compiled:
    """Compile for `target`: sm_90 gives machine code, compute_90 PTX.

    Raises:
        CompileError: with the compiler's messages.
    """
    from cupy.cuda import nvrtc

    headers = _headers()
    program = nvrtc.createProgram(
        _source(name), f"{name}.cu", list(headers.values()), list(headers)
    )
    try:
        try:
            nvrtc.compileProgram(program, _options(defines, target))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(f"{name}.cu for {target} {dict(defines)}: {error}\n{log}") from error
        log = nvrtc.getProgramLog(program)
        if not target.startswith("sm_"):
            return Compiled(nvrtc.getPTX(program), log)
        # CuPy cuts off the last byte of machine code, which is a zero.
        return Compiled(nvrtc.getCUBIN(program) + b"\0", log)
    finally:
        nvrtc.destroyProgram(program)


class CompileError(RuntimeError):
    """A kernel does not compile: the compiler's messages."""


@cache
def _load(
    name: str, defines: tuple[tuple[str, str | int], ...], cooperative: bool, target: str
) -> cupy.RawKernel:
    import cupy

    path = _cached_image(name, dict(defines), target)
    module = cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative)
    return module.get_function(name)


def _target() -> str:
    """What to compile for; QTOOL_KERNEL_TARGET=compute_80, say, leaves the rest to the driver."""
    import cupy

    forced = os.environ.get("QTOOL_KERNEL_TARGET")
    return forced or f"sm_{cupy.cuda.Device().compute_capability}"


def _cached_image(name: str, defines: Defines, target: str) -> Path:
    """The file of the machine code; where the cache cannot be written, one for this process.

    CuPy's version stands for the compiler's, which takes a while to load.
    """
    import cupy

    parts = [_source(name), *map(str, _headers().items())]
    parts += [*_options(defines, target), cupy.__version__]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    suffix = "cubin" if target.startswith("sm_") else "ptx"
    path = cache_folder() / f"{name}-{target}-{digest}.{suffix}"
    if path.exists():
        return path
    image = compile_kernel(name, defines, target).image
    try:
        _write_whole(path, image)
    except OSError:
        path = _own_folder() / path.name
        _write_whole(path, image)
    return path


def cache_folder() -> Path:
    """Where compiled kernels are kept: QTOOL_KERNEL_CACHE, or the user's cache folder."""
    if folder := os.environ.get("QTOOL_KERNEL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool" / "kernels"


@cache
def _own_folder() -> Path:
    """A folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="qtool-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write_whole(path: Path, data: bytes) -> None:
    """Another process never sees half a file, nor one after a power cut; what fails leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _options(defines: Defines, target: str) -> tuple[str, ...]:
    macros = (f"--define-macro={key}={value}" for key, value in sorted(defines.items()))
    return (f"--gpu-architecture={target}", *COMPILE_OPTIONS, *macros)


@cache
def _source(name: str) -> str:
    return (SOURCES / f"{name}.cu").read_text(encoding="utf-8")


@cache
def _headers() -> dict[bytes, bytes]:
    """By name: the .cuh files, and the code tables as a header."""
    files = {path.name.encode(): path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    return files | {b"code_tables.cuh": code_tables_header().encode()}
