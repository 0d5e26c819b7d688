"""Every kernel in every specialisation that the launchers ask for.

    python -m cupy_kernels.inventory sm_75 sm_90

compiles them all, which needs CuPy and NVRTC but no GPU, and prints registers and spills. All
targets take some minutes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from cupy_kernels.launch import DTYPES
from cupy_kernels.loader import Compiled, compile_kernel
from cupy_kernels.quantize_int8_rows import ROW_SHAPES
from qtool.formats.precisions import BLOCKSIZES

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True, slots=True)
class Specialisation:
    """A kernel and the macros it is compiled with."""

    name: str
    defines: tuple[tuple[str, str | int], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, *(str(value) for _, value in self.defines)])


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes per thread; spilled bytes are read and written."""

    registers: int
    spilled_bytes: int


def specialisations() -> Iterator[Specialisation]:
    """All of them, kernel by kernel."""
    for dtype in DTYPES.values():
        for quant_type in ("nf4", "fp4"):
            for blocksize in BLOCKSIZES:
                yield _make(
                    "quantize_4bit",
                    SOURCE=dtype,
                    QUANT_TYPE=quant_type.capitalize(),
                    BLOCKSIZE=blocksize,
                )
            for nested in (0, 1):
                yield _make("dequantize_4bit", TARGET=dtype, QUANT_TYPE=quant_type, NESTED=nested)
        for threads, octets in ROW_SHAPES[dtype]:
            yield _make("quantize_int8_rows", SOURCE=dtype, ROW_THREADS=threads, OCTETS=octets)
        yield _make("dequantize_int8_rows", TARGET=dtype)
        yield _make("count_nonfinite", SOURCE=dtype)
    yield _make("quantize_absmax")
    yield _make("dequantize_absmax")


def resources(compiled: Compiled) -> Resources:
    """Read them from the compiler's log.

    Raises:
        ValueError: the log does not say.
    """
    registers = re.search(r"Used (\d+) registers", compiled.log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    if registers is None or spills is None:
        raise ValueError(f"no resources in the compiler's log: {compiled.log!r}")
    return Resources(int(registers[1]), int(spills[1]) + int(spills[2]))


def _make(name: str, **defines: str | int) -> Specialisation:
    return Specialisation(name, tuple(defines.items()))


def _print_resources(targets: list[str]) -> None:
    sys.stdout.write("registers per thread / bytes spilled\n")
    sys.stdout.write(f"{'':40}" + "".join(f"{target:>12}" for target in targets) + "\n")
    for kernel in specialisations():
        cells = []
        for target in targets:
            used = resources(compile_kernel(kernel.name, dict(kernel.defines), target))
            cells.append(f"{used.registers} / {used.spilled_bytes}")
        sys.stdout.write(f"{kernel!s:40}" + "".join(f"{cell:>12}" for cell in cells) + "\n")


if __name__ == "__main__":
    _print_resources(sys.argv[1:] or list(TARGETS))
