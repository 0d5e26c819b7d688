"""Every kernel compiles for every architecture, without a GPU, and keeps to its registers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cupy_kernels import linear_some
from cupy_kernels.inventory import TARGETS, resources, shared_memory, specialisations
from cupy_kernels.linear_few import OLDEST_COMPUTE_CAPABILITY, LinearKind
from cupy_kernels.loader import SOURCES, CompileError, compile_kernel

pytest.importorskip("cupy", exc_type=ImportError)

EVERYTHING = ("sm_75", "sm_90")  # the oldest, and the one that was tuned
USUAL_BLOCKSIZES = {64, 4096}
# Bytes that are spilled knowingly, by tokens. 16 warps leave a thread 128 registers, which the norm
# before eight tokens exceeds a little on sm_100; 8 warps might be faster there or not: none was
# measured.
KNOWN_SPILLS = {("sm_100", "linear_few", 8): 128}
# With adapters the same norm exceeds them on sm_90 too.
KNOWN_SPILLS |= {("sm_90", "linear_few", 8): 24}
# Eight tokens of a slice of long rows are a quarter of a thread's registers.
KNOWN_SPILLS |= {("sm_80", "linear_few", 8): 24}
# 64 tokens' sums, and as many of a block, are half of a thread's registers, which pointers exceed.
KNOWN_SPILLS |= {(target, "linear_some", 64): 192 for target in TARGETS}
# Columns that chunks do not divide evenly, or the scales of two blocks of 32, take two more.
KNOWN_SPILLS |= {("sm_90", "linear_groups", 32): 16, ("sm_90", "linear_some", 8): 8}
# Some values are needed once a tile, and are kept in memory over the loop, which has the registers.
KNOWN_SPILLS |= {("sm_90", "linear_many", 256): 32}


def known_spills(target, kernel):
    return KNOWN_SPILLS.get((target, kernel.name, dict(kernel.defines).get("TOKENS")), 0)


def kernels_for(target):
    """All on two architectures; on the others usual block sizes, and activations in bfloat16."""
    for kernel in specialisations(target):
        defines = dict(kernel.defines)
        is_usual = (
            defines.get("BLOCKSIZE", 64) in USUAL_BLOCKSIZES
            and defines.get("ACTIVATION", "Bf16") == "Bf16"
        )
        if is_usual or target in EVERYTHING:
            yield kernel


def test_every_source_is_compiled():
    names = {kernel.name for kernel in specialisations("sm_90")}
    assert names == {path.stem for path in SOURCES.glob("*.cu")}


def test_kernels_of_the_decode_step_begin_with_sm_80():
    """As products and decoders ask before they launch one."""
    major, minor = OLDEST_COMPUTE_CAPABILITY
    for target in TARGETS:
        compiled = {kernel.name for kernel in specialisations(target)}
        runs = int(target[3:]) >= 10 * major + minor
        assert [name in compiled for name in ("linear_few", "int8_sums")] == [runs, runs]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling(target, record_property):
    def compiled(kernel):
        return resources(
            compile_kernel(kernel.name, dict(kernel.defines), kernel.target_of(target))
        )

    kernels = list(kernels_for(target))
    with ThreadPoolExecutor(2) as pool:
        used = dict(zip(map(str, kernels), pool.map(compiled, kernels), strict=True))
    for name, taken in used.items():
        record_property(name, f"{taken.registers} registers")
    spilling = {
        str(kernel): used[str(kernel)]
        for kernel in kernels
        if used[str(kernel)].spilled_bytes > known_spills(target, kernel)
    }
    assert not spilling
    in_memory = {name for name, it in used.items() if it.stack_bytes and not it.spilled_bytes}
    assert not in_memory


@pytest.mark.parametrize(
    ("tokens", "tuning"),
    [(tokens, tuning) for tokens, found in linear_some.GROUP_TUNINGS.items() for tuning in found],
)
@pytest.mark.parametrize("columns", [4096, 11008])
def test_products_of_warpgroups_compile_for_hopper_alone(columns, tokens, tuning):
    kind = LinearKind("nf4", columns, "BF16", nested=True)
    plan = linear_some.plan_with(tuning, kind, 4096, tokens, shared_memory("sm_90"))
    assert plan is not None
    compiled = compile_kernel(plan.kernel, dict(plan.defines), "sm_90a")
    is_tight = tokens == 32 and tuning.column_warps == 4 and columns == 11008
    assert resources(compiled).spilled_bytes <= (16 if is_tight else 0)
    assert "serializ" not in compiled.log  # what the compiler says where it waits for each product
    with pytest.raises(CompileError, match="wgmma"):
        compile_kernel(plan.kernel, dict(plan.defines), "sm_90")


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
