"""How linear_few.cu is specialised for a GPU's shared memory: pure arithmetic, without a GPU."""

from __future__ import annotations

import itertools

import pytest

from cupy_kernels.inventory import SHARED_KIB, shared_memory
from cupy_kernels.linear_few import (
    MAX_TOKENS,
    LinearFew,
    LinearKind,
    LinearWeight,
    NormWeight,
    SharedMemory,
    fits,
    specialise,
)

BITS = {"NF4": 4, "FP4": 4, "INT8": 8, "PLAIN": 16}
TOKENS = (1, 2, 4, 8)
COLUMNS = (64, 192, 1408, 2048, 4096, 5120, 8192, 14336, 28672)
LARGEST_HIDDEN = (
    14336  # columns of a layer with a norm before it; larger ones come after gate and up
)
RESERVED_BYTES = 1024  # of shared memory, for each thread block


def kinds(columns=COLUMNS, norms=("none", "rms")):
    """With the number of layers of a launch."""
    packed = [("nf4", 64, False), ("nf4", 32, True), ("fp4", 4096, True)]
    for (fmt, blocksize, nested), size, norm, num_weights in itertools.product(
        [*packed, ("int8", 64, False), ("plain", 64, False)], columns, norms, (1, 2, 3)
    ):
        yield LinearKind(fmt, size, "BF16", blocksize, nested=nested, norm=norm), num_weights


def specialised(gpu):
    """Everything that goes on this GPU."""
    for (kind, num_weights), tokens in itertools.product(kinds(), TOKENS):
        try:
            yield kind, *specialise(kind, num_weights, tokens, gpu)
        except ValueError:
            continue


def chunk_of(defines):
    return 128 * 8 // BITS[defines["FORMAT"]]


def shares_x(defines):
    """Whether activations pass through shared memory."""
    return not defines["HELD_X"] or defines["NORM"] != 0


def line_tiles(defines):
    """Tiles of a pass whose sums the lines hold, as linear_few.cu counts them."""
    maps = defines["NUM_WEIGHTS"] * 256 if defines["NESTED"] else 0
    most = (256 * 32 - maps) // (defines["WARPS"] * 16 * defines["TOKENS"])
    return min(defines["PASS"], most)


@pytest.fixture(params=SHARED_KIB)
def gpu(request):
    return shared_memory(request.param)


def test_shared_memory_holds_all_parts_and_the_gpu_has_it(gpu):
    for kind, defines, tuning, shared_bytes in specialised(gpu):
        tokens, warps = defines["TOKENS"], defines["WARPS"]
        lines = 256 * (256 if BITS[defines["FORMAT"]] == 4 else 128)
        activations = defines["SLICE"] * tokens * 2 if tokens > 1 and shares_x(defines) else 0
        rings = warps * defines["STAGES"] * 16 * 128
        more_sums = (defines["PASS"] - line_tiles(defines)) * warps * 16 * tokens * 4
        parts = lines + activations + rings + more_sums + warps * tokens * 4
        assert parts == shared_bytes, kind
        assert shared_bytes <= gpu.block_bytes, kind
        assert tuning.blocks == defines["MIN_BLOCKS"]
        assert tuning.blocks * (shared_bytes + RESERVED_BYTES) <= gpu.multiprocessor_bytes, kind


def test_lines_hold_maps_sums_and_the_activations_of_one_token(gpu):
    """The static_assert in linear_few.cu, in numbers."""
    for kind, defines, _, _ in specialised(gpu):
        maps = defines["NUM_WEIGHTS"] * 256 if defines["NESTED"] else 0
        sums = defines["WARPS"] * line_tiles(defines) * 16 * defines["TOKENS"]
        is_shared = defines["TOKENS"] == 1 and shares_x(defines)
        activations = defines["SLICE"] // 64 if is_shared else 0
        assert defines["PASS"] >= 1
        assert (maps + sums) / 32 + activations <= 256, kind
        if shares_x(defines) or defines["TOKENS"] == 1:
            assert line_tiles(defines) == defines["PASS"], kind


def test_slices_are_whole_chunks_that_occupy_every_warp(gpu):
    seen = 0
    for kind, defines, _, _ in specialised(gpu):
        size, chunk = defines["SLICE"], chunk_of(defines)
        assert size % chunk == 0, kind
        if size >= kind.columns:
            assert size < kind.columns + chunk, kind
            continue
        seen += 1
        assert kind.norm == "none", kind
        assert size >= defines["WARPS"] * chunk, kind
    assert seen


def test_warps_that_hold_activations_have_the_same_chunks_of_every_tile(gpu):
    seen = set()
    for kind, defines, _, _ in specialised(gpu):
        if not defines["HELD_X"]:
            continue
        chunks, others = divmod(defines["SLICE"], chunk_of(defines))
        warp_chunks, uneven = divmod(chunks, defines["WARPS"])
        columns = kind.columns if defines["SLICE"] < kind.columns else defines["SLICE"]
        assert others == uneven == columns % defines["SLICE"] == 0, kind
        assert defines["NORM"] == 0 or defines["SLICE"] >= kind.columns, kind
        blocks = warp_chunks * chunk_of(defines) // 64
        # a lane has eight registers of a block; of a single token one block of two chunks
        registers = 8 * (-(-warp_chunks // 2) if defines["TOKENS"] == 1 else blocks)
        assert 0 < registers <= (64 if defines["TOKENS"] in (2, 4) else 32), kind
        seen.add((defines["TOKENS"], defines["SLICE"] < kind.columns, defines["NORM"] != 0))
    assert {(1, False, False), (1, True, False), (1, False, True)} <= seen
    if gpu.block_bytes > 160 << 10:  # rings of 14 warps beside the table
        assert {(2, False, False), (4, False, False), (8, False, True), (8, True, False)} <= seen


@pytest.mark.parametrize(
    ("kind", "tokens", "warps", "slice_columns"),
    [
        (LinearKind("nf4", 4096, "BF16", nested=True), 1, 8, 4096),
        (LinearKind("nf4", 14336, "BF16", nested=True), 1, 8, 14336),
        (LinearKind("nf4", 4096, "BF16", nested=True, norm="rms"), 8, 16, 4096),
        (LinearKind("nf4", 28672, "BF16", nested=True), 1, 8, 14336),
        (LinearKind("nf4", 4096, "BF16", nested=True), 4, 8, 4096),
        (LinearKind("nf4", 14336, "BF16", nested=True), 8, 14, 14 * 256),
        (LinearKind("int8", 4096, "BF16"), 8, 16, 4096),
    ],
)
def test_activations_of_usual_layers_are_held(kind, tokens, warps, slice_columns):
    defines, tuning, _ = specialise(kind, 1, tokens, shared_memory("sm_90"))
    assert defines["HELD_X"] == 1
    assert (tuning.warps, defines["SLICE"]) == (warps, slice_columns)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        (LinearKind("nf4", 11008, "BF16"), 8),  # 43 chunks
        (LinearKind("nf4", 14336, "BF16"), 2),  # slices do not pay
        (LinearKind("int8", 4096, "BF16"), 1),  # bytes are the limit
    ],
)
def test_activations_that_are_not_held(kind, tokens):
    defines, _, _ = specialise(kind, 1, tokens, shared_memory("sm_90"))
    assert defines["HELD_X"] == 0


def test_every_gpu_takes_every_kind_without_a_norm_and_one_token_with_it(gpu):
    for kind, num_weights in kinds(norms=("none",)):
        for tokens in TOKENS:
            specialise(kind, num_weights, tokens, gpu)
    hidden_sizes = [size for size in COLUMNS if size <= LARGEST_HIDDEN]
    for kind, num_weights in kinds(hidden_sizes, norms=("rms", "rms_plus_one")):
        specialise(kind, num_weights, 1, gpu)


@pytest.mark.parametrize(("target", "columns"), [("sm_80", 4096), ("sm_90", 8192)])
def test_a_norm_before_eight_tokens_needs_all_columns_at_once(target, columns):
    for fmt, nested in (("nf4", True), ("int8", False), ("plain", False)):
        kind = LinearKind(fmt, columns, "BF16", nested=nested, norm="rms")
        defines, _, _ = specialise(kind, 3, 8, shared_memory(target))
        assert defines["SLICE"] == columns
    kind = LinearKind("nf4", 4 * columns, "BF16", norm="rms")
    with pytest.raises(ValueError, match=f"products of 8 tokens with {4 * columns} columns and a"):
        specialise(kind, 3, 8, shared_memory(target))


def test_a_gpu_with_too_little_shared_memory_is_refused():
    gpu = SharedMemory(64 << 10, 64 << 10, 40)
    with pytest.raises(ValueError, match="65536 bytes of shared memory are too few"):
        specialise(LinearKind("nf4", 4096, "BF16"), 1, 1, gpu)


def test_plain_dtypes_that_the_kernel_lacks_are_refused(gpu):
    with pytest.raises(ValueError, match="dtype F64 is none of"):
        specialise(LinearKind("plain", 4096, "F64"), 1, 1, gpu)


def test_rows_of_whole_groups_of_64_fit():
    assert fits(LinearKind("nf4", 192, "BF16"))
    assert not fits(LinearKind("nf4", 96, "BF16"))


KIND = LinearKind("nf4", 4096, "BF16")
GATED = LinearKind("nf4", 4096, "BF16", epilogue="gated")
NORMED = LinearKind("nf4", 4096, "BF16", norm="rms")
ROWS = LinearWeight(256, 1 << 20)


@pytest.mark.parametrize(
    ("kind", "weights", "max_tokens", "message"),
    [
        (KIND, [ROWS], 0, "0 tokens, the kernel takes 1 to 8"),
        (KIND, [ROWS], MAX_TOKENS + 1, "9 tokens, the kernel takes 1 to 8"),
        (KIND, [], 1, "0 layers, the kernel takes 1 to 3"),
        (KIND, [ROWS] * 4, 1, "4 layers, the kernel takes 1 to 3"),
        (GATED, [ROWS], 1, "gate and up are two layers"),
        (GATED, [ROWS, LinearWeight(128, 1 << 20)], 1, "of the same number of rows"),
        (LinearKind("int8", 100, "BF16"), [ROWS], 1, "100 columns are no multiple of 64"),
        (NORMED, [ROWS], 1, "the norm is rms, its weight None"),
    ],
)
def test_launches_that_the_kernel_does_not_take(kind, weights, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        LinearFew(kind, weights, max_tokens=max_tokens)


def test_a_norm_that_the_kind_does_not_name():
    with pytest.raises(ValueError, match="the norm is none"):
        LinearFew(KIND, [ROWS], max_tokens=1, norm=NormWeight(1 << 20, 1e-5))
