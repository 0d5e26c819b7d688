"""Every kernel in every specialisation that the launchers ask for.

    python -m cupy_kernels.inventory sm_75 sm_90

compiles them all, which needs CuPy and NVRTC but no GPU, and prints registers and spills. All
targets take some minutes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final, get_args

from cupy_kernels import (
    adapter_inner,
    argmax_rows,
    decode_attention,
    linear_many,
    linear_some,
    optimizer_8bit,
    prompt_rows,
)
from cupy_kernels.adapter_inner import InnerKind
from cupy_kernels.decode_attention import AttentionShape
from cupy_kernels.launch import DTYPES
from cupy_kernels.linear_few import LinearKind, Norm, SharedMemory, specialise
from cupy_kernels.loader import Compiled, compile_kernel
from cupy_kernels.quantize_int8_rows import ROW_SHAPES
from qtool.formats.precisions import BLOCKSIZES

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# KiB of shared memory that a thread block may have and that a multiprocessor has (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability"). sm_75 is not among them:
# the kernels of the decode step need asynchronous copies and bfloat16 in tensor cores.
SHARED_KIB: Final = {
    "sm_80": (163, 164),
    "sm_86": (99, 100),
    "sm_89": (99, 100),
    "sm_90": (227, 228),
    "sm_100": (227, 228),
    "sm_120": (99, 100),
}

# Layers of a launch by kind. A kernel is made for its columns, of which there are too many to
# compile all: these are sizes of 7B to 70B models, and one whose rows end within a chunk.
LINEARS: Final = (
    (LinearKind("nf4", 4096, "BF16"), 1),
    (LinearKind("nf4", 4096, "BF16", blocksize=32), 1),
    (LinearKind("nf4", 4096, "BF16", nested=True, norm="rms"), 3),
    (LinearKind("nf4", 4096, "BF16", nested=True, norm="rms", epilogue="gated"), 2),
    (LinearKind("nf4", 14336, "BF16", nested=True, epilogue="residual"), 1),
    (LinearKind("nf4", 1408, "F16", norm="rms_plus_one", epilogue="gated", gate="gelu_tanh"), 2),
    (LinearKind("fp4", 4096, "F16", nested=True), 1),
    (LinearKind("fp4", 1408, "BF16", blocksize=32, nested=True, norm="rms"), 3),
    (LinearKind("int8", 4096, "BF16", norm="rms"), 3),
    (LinearKind("int8", 4096, "F16", norm="rms", epilogue="gated"), 2),
    (LinearKind("int8", 14336, "BF16", epilogue="residual"), 1),
    (LinearKind("plain", 4096, "BF16", norm="rms"), 1),
    (LinearKind("plain", 14336, "F16", epilogue="residual"), 1),
    (LinearKind("plain", 1408, "BF16", norm="rms", epilogue="gated", gate="gelu"), 2),
    (LinearKind("nf4", 4096, "BF16", nested=True, norm="rms", adapted=True), 3),
    (LinearKind("nf4", 4096, "BF16", nested=True, epilogue="residual", adapted=True), 1),
    (LinearKind("nf4", 4096, "BF16", nested=True, norm="rms", epilogue="gated", adapted=True), 2),
    (LinearKind("nf4", 14336, "BF16", nested=True, epilogue="residual", adapted=True), 1),
    (LinearKind("int8", 4096, "F16", norm="rms", epilogue="gated", adapted=True), 2),
    (LinearKind("plain", 1408, "BF16", adapted=True), 1),
)
# Of adapters of several layers together, those of a large rank among them.
ADAPTERS: Final = (
    InnerKind(4096, 48, "BF16", "rms"),
    InnerKind(14336, 16, "BF16"),
    InnerKind(28672, 512, "BF16"),
    InnerKind(8192, 768, "F16", "rms"),
    InnerKind(1408, 8, "BF16", "rms_plus_one"),
)
TOKENS: Final = (1, 8)

# Layers alone, with some tokens.
SOME_LINEARS: Final = (
    LinearKind("nf4", 4096, "BF16", nested=True),
    LinearKind("nf4", 14336, "F16", nested=True),
    LinearKind("nf4", 1408, "BF16", blocksize=32, nested=True),
    LinearKind("fp4", 4096, "BF16", blocksize=32),
    LinearKind("int8", 4096, "BF16"),
    LinearKind("int8", 1408, "F16"),
    LinearKind("plain", 4096, "BF16"),
)
SOME_ROWS: Final = 4096

# And with many, for any number of columns, in tiles of these shapes.
MANY_LINEARS: Final = (
    (LinearKind("nf4", 256, "BF16", nested=True), linear_many.SHAPES),
    (LinearKind("fp4", 256, "F16"), linear_many.SHAPES[::4]),
    (LinearKind("int8", 256, "BF16"), linear_many.SHAPES[1::2]),
    (LinearKind("int8", 256, "F16"), linear_many.SHAPES[::4]),
)

NORM_KINDS: Final[tuple[Norm, ...]] = ("rms", "rms_plus_one")

# Query and key heads, sizes of a head, norm of heads, softcap.
ATTENTIONS: Final = (
    (32, 32, 96, "none", False),
    (32, 8, 64, "none", False),
    (32, 8, 128, "rms", False),
    (8, 1, 128, "none", False),
    (8, 1, 256, "none", False),
    (16, 4, 256, "rms_plus_one", True),
    (8, 4, 256, "none", True),
    (8, 4, 256, "rms_plus_one", False),
    (32, 16, 128, "rms_plus_one", False),
)


@dataclass(frozen=True, slots=True)
class Specialisation:
    """A kernel and the macros it is compiled with.

    Attributes:
        purpose: what it is for, where the macros differ between GPUs.
    """

    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    purpose: str = ""

    def target_of(self, target: str) -> str:
        """What to compile for: warpgroups are instructions that no later GPU has (sm_90a)."""
        return f"{target}a" if dict(self.defines).get("WARPGROUPS") else target

    def __str__(self) -> str:
        values = " ".join(str(value) for _, value in self.defines)
        return f"{self.name} {self.purpose or values}".rstrip()


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes per thread; spilled bytes are read and written.

    Attributes:
        stack_bytes: local memory, of what is spilled or has to have an address.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.spilled_bytes}"


def specialisations(target: str) -> Iterator[Specialisation]:
    """All of them, kernel by kernel; of those that are made for a model's sizes, the usual ones.

    Kernels of products and of the decode step are left out where they do not run (`SHARED_KIB`).
    """
    yield from _of_formats()
    yield from _of_optimizers(int(target.removeprefix("sm_")))
    if target in SHARED_KIB:
        yield from _of_products(shared_memory(target))
        yield from _of_int8_products()
        if target == "sm_90":
            yield from _of_warpgroups(shared_memory(target))
        yield from _of_the_decode_step()


def shared_memory(target: str) -> SharedMemory:
    """Of a GPU of this kind; the number of multiprocessors does not matter here."""
    block_kib, multiprocessor_kib = SHARED_KIB[target]
    return SharedMemory(
        block_bytes=block_kib << 10,
        multiprocessor_bytes=multiprocessor_kib << 10,
        multiprocessors=1,
    )


def _of_formats() -> Iterator[Specialisation]:
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


def _of_int8_products() -> Iterator[Specialisation]:
    for dtype in (DTYPES["BF16"], DTYPES["F16"]):
        yield _make("int8_outliers", SOURCE=dtype)
        for threads, octets in ROW_SHAPES[dtype]:
            yield _make("int8_activations", SOURCE=dtype, ROW_THREADS=threads, OCTETS=octets)
        for added in (0, 1):
            yield _make("int8_sums", ACTIVATION=dtype, ADDED=added)


def _of_optimizers(compute_capability: int) -> Iterator[Specialisation]:
    copies = 8 if compute_capability < 80 else 32  # of tables, by shared memory
    threads = optimizer_8bit.threads_for(compute_capability)
    for algorithm in get_args(optimizer_8bit.Algorithm):
        yield _make(
            "optimizer_scalars",
            ALGORITHM=algorithm.upper(),
            MAX_GROUPS=optimizer_8bit.MAX_GROUPS,
        )
        for dtype in DTYPES:
            for bits in (8, 32):
                kind = optimizer_8bit.UpdateKind(algorithm, dtype, bits)
                defines = optimizer_8bit.specialise(kind, copies, threads)
                yield _make("optimizer_8bit", **defines)
    yield _make("store_words", MAX_WORDS=optimizer_8bit.MAX_WORDS)


def _of_products(gpu: SharedMemory) -> Iterator[Specialisation]:
    for kind, num_weights in LINEARS:
        for tokens in TOKENS:
            try:
                defines, _, _ = specialise(kind, num_weights, tokens, gpu)
            except ValueError:  # too little shared memory: such models take another path
                continue
            purpose = f"{_in_words(kind)} x{num_weights}, tokens {tokens}"
            yield Specialisation("linear_few", tuple(defines.items()), purpose)
    for adapters in ADAPTERS:
        for tokens in TOKENS:
            defines = adapter_inner.specialise(adapters, tokens)
            yield _make("adapter_inner", **defines)
    for kind in SOME_LINEARS:
        for tokens in linear_some.TOKEN_CLASSES:
            plan = linear_some.specialise(kind, SOME_ROWS, tokens, gpu)
            yield Specialisation("linear_some", plan.defines, f"{_in_words(kind)}, tokens {tokens}")


def _of_warpgroups(gpu: SharedMemory) -> Iterator[Specialisation]:
    for kind in filter(linear_some.multiplies_in_groups, SOME_LINEARS):
        for tokens, tunings in linear_some.GROUP_TUNINGS.items():
            for tuning in tunings:
                plan = linear_some.plan_with(tuning, kind, SOME_ROWS, tokens, gpu)
                if plan is not None:
                    warps = f"{tuning.row_warps} x {tuning.column_warps} warps in groups"
                    blocks = f", {tuning.split} blocks" if tuning.split > 1 else ""
                    rows = f"{tuning.rows} rows"
                    purpose = f"{_in_words(kind)}, tokens {tokens}, {rows}, {warps}{blocks}"
                    yield Specialisation(plan.kernel, plan.defines, purpose)
    for kind, shapes in MANY_LINEARS:
        for shape in shapes:
            purpose = f"{_in_words(kind)}, tiles of {shape.tokens} tokens, {shape.split} blocks"
            defines = linear_many.defines_of(kind, shape)
            yield Specialisation("linear_many", tuple(defines.items()), purpose)


def _in_words(kind: LinearKind) -> str:
    """The fields that are not the usual ones."""
    usual = LinearKind(kind.format, kind.columns, kind.dtype)
    pairs = ((field.name, getattr(kind, field.name)) for field in fields(kind))
    unusual = [f"{name}={value}" for name, value in pairs if value != getattr(usual, name)]
    return ", ".join([f"{kind.format} {kind.columns} {kind.dtype}", *unusual])


def _of_the_decode_step() -> Iterator[Specialisation]:
    for heads, kv_heads, head_dim, head_norm, has_softcap in ATTENTIONS:
        for dtype in ("BF16", "F16"):
            yield from _of_attention(
                AttentionShape(
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    rotary_dim=head_dim,
                    head_norm=head_norm,
                    has_softcap=has_softcap,
                    batch=1,
                    capacity=0,
                    dtype=dtype,
                )
            )
    for dtype in (DTYPES["BF16"], DTYPES["F16"]):
        yield _make(
            "argmax_rows", ACTIVATION=dtype, BLOCKS=argmax_rows.BLOCKS, WARPS=argmax_rows.WARPS
        )
        for gate in ("SILU", "GELU_TANH", "GELU"):
            yield _make("gated_rows", ACTIVATION=dtype, GATE=gate)
    for name in ("BF16", "F16"):
        for norm in NORM_KINDS:
            for added in (False, True):
                yield _make("norm_rows", **prompt_rows.norm_defines(4096, name, norm, added=added))


def _of_attention(shape: AttentionShape) -> Iterator[Specialisation]:
    yield _make("decode_attention", **decode_attention.defines(shape))
    yield _make("rotary_rows", **prompt_rows.rotary_defines(shape))


def resources(compiled: Compiled) -> Resources:
    """Read them from the compiler's log.

    Raises:
        ValueError: the log does not say.
    """
    registers = re.search(r"Used (\d+) registers", compiled.log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    stack = re.search(r"(\d+) bytes stack frame", compiled.log)
    if registers is None or spills is None or stack is None:
        raise ValueError(f"no resources in the compiler's log: {compiled.log!r}")
    return Resources(int(registers[1]), int(spills[1]) + int(spills[2]), int(stack[1]))


def _make(name: str, **defines: str | int) -> Specialisation:
    return Specialisation(name, tuple(defines.items()))


def _print_resources(targets: list[str]) -> None:
    used: dict[str, dict[str, Resources]] = {}
    for target in targets:
        for kernel in specialisations(target):
            compiled = compile_kernel(kernel.name, dict(kernel.defines), kernel.target_of(target))
            used.setdefault(str(kernel), {})[target] = resources(compiled)
    width = max(map(len, used))
    sys.stdout.write("registers per thread / bytes spilled; - where it does not run\n")
    sys.stdout.write(" " * width + "".join(f"{target:>12}" for target in targets) + "\n")
    for name, found in used.items():
        cells = "".join(f"{found.get(target, '-')!s:>12}" for target in targets)
        sys.stdout.write(f"{name:{width}}{cells}\n")


if __name__ == "__main__":
    _print_resources(sys.argv[1:] or list(TARGETS))
