"""Every kernel compiles for every architecture, without a GPU, and keeps to its registers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cupy_kernels.inventory import TARGETS, resources, specialisations
from cupy_kernels.loader import CompileError, compile_kernel

pytest.importorskip("cupy", exc_type=ImportError)

EVERYTHING = ("sm_75", "sm_90")  # the oldest, and the one that was tuned
USUAL_BLOCKSIZES = {64, 4096}


def kernels_for(target):
    """All on two architectures; on the others the usual block sizes alone."""
    for kernel in specialisations():
        blocksize = dict(kernel.defines).get("BLOCKSIZE", 64)
        if target in EVERYTHING or blocksize in USUAL_BLOCKSIZES:
            yield kernel


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling(target, record_property):
    def compiled(kernel):
        return resources(compile_kernel(kernel.name, dict(kernel.defines), target))

    kernels = list(kernels_for(target))
    with ThreadPoolExecutor(2) as pool:
        used = dict(zip(map(str, kernels), pool.map(compiled, kernels), strict=True))
    for name, taken in used.items():
        record_property(name, f"{taken.registers} registers")
    assert not {name: taken for name, taken in used.items() if taken.spilled_bytes}


def test_ptx_is_made_for_the_driver_to_compile():
    defines = {"SOURCE": "Bf16", "QUANT_TYPE": "Nf4", "BLOCKSIZE": 64}
    ptx = compile_kernel("quantize_4bit", defines, "compute_75").image
    assert b".target sm_75" in ptx and b".entry quantize_4bit" in ptx


def test_a_compiler_error_names_the_kernel_the_target_and_the_line():
    with pytest.raises(CompileError, match=r"(?s)count_nonfinite\.cu for sm_90.*Bf15"):
        compile_kernel("count_nonfinite", {"SOURCE": "Bf15"}, "sm_90")


def test_machine_code_is_whole():
    """CuPy's binding returns it without the last byte; the program headers end the file."""
    image = compile_kernel("dequantize_absmax", {}, "sm_90").image
    start = int.from_bytes(image[32:40], "little")
    entry_bytes, num_entries = (int.from_bytes(image[i : i + 2], "little") for i in (54, 56))
    assert start + entry_bytes * num_entries == len(image)
