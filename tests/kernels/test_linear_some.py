"""How linear_some.cu and linear_groups.cu are specialised for a GPU, without one."""

from __future__ import annotations

import ctypes
import itertools

import pytest

from cupy_kernels import linear_some, token_map
from cupy_kernels.inventory import SHARED_KIB
from cupy_kernels.linear_few import LinearKind, LinearWeight, SharedMemory, Tokens
from cupy_kernels.linear_some import (
    COUNTER_BYTES,
    GROUP_TUNINGS,
    TOKEN_CLASSES,
    TUNINGS,
    LinearSome,
    Plan,
    Tuning,
    multiplies_in_groups,
    plan_with,
    specialise,
)

BITS = {"NF4": 4, "FP4": 4, "INT8": 8, "PLAIN": 16}
FORMATS = [("nf4", 64, True), ("nf4", 32, True), ("fp4", 4096, False), ("int8", 64, False)]
COLUMNS = (64, 192, 1408, 4096, 28672)
ROWS = (16, 1000, 4096, 128256)
RESERVED_BYTES = 1024  # of shared memory, for each thread block
MOST_MULTIPROCESSORS = 160


@pytest.fixture(params=itertools.product(SHARED_KIB, (1, 40, 132, MOST_MULTIPROCESSORS)))
def gpu(request):
    target, multiprocessors = request.param
    block_kib, multiprocessor_kib = SHARED_KIB[target]
    return SharedMemory(block_kib << 10, multiprocessor_kib << 10, multiprocessors)


def plans(gpu):
    """All kinds, which every GPU takes."""
    formats = [*FORMATS, ("plain", 64, False)]
    for (fmt, blocksize, nested), columns, rows, tokens, groups in itertools.product(
        formats, COLUMNS, ROWS, TOKEN_CLASSES, (False, True)
    ):
        kind = LinearKind(fmt, columns, "BF16", blocksize, nested=nested)
        if not groups or gpu.block_bytes == 227 << 10:
            plan = specialise(kind, rows, tokens, gpu, has_warpgroups=groups)
            yield kind, rows, tokens, plan


def test_shared_memory_holds_all_parts_and_the_gpu_has_it(gpu):
    """The layouts in the .cu files, in numbers."""
    for kind, _, tokens, plan in plans(gpu):
        defines = dict(plan.defines)
        assert plan.shared_bytes <= gpu.block_bytes
        assert plan.shared_bytes + RESERVED_BYTES <= gpu.multiprocessor_bytes
        if plan.tuning.x_stages:
            assert plan.shared_bytes == bytes_of_groups(defines)
            continue
        has_table = BITS[defines["FORMAT"]] == 4
        warps = defines["ROW_WARPS"] * defines["COLUMN_WARPS"]
        lines = 3 * defines["COLUMN_WARPS"] * defines["X_COLUMNS"] // 64 * tokens
        lines += 8 * defines["NESTED"] + 1
        in_gaps = has_table and lines <= 256
        rings = warps * defines["STAGES"] * defines["FRAGMENTS"] * 16 * defines["LINE"]
        column_sums = (defines["COLUMN_WARPS"] - 1) * plan.tuning.rows * tokens * 4
        parts = (256 * 256 * has_table, 0 if in_gaps else lines * 128, rings, column_sums)
        assert sum(parts) == plan.shared_bytes, kind


def bytes_of_groups(defines):
    """Table, activations, rings; sums that warps give to others where gaps do not hold them."""
    row_warps, column_warps = defines["ROW_WARPS"], defines["COLUMN_WARPS"]
    x_bytes = defines["X_STAGES"] * column_warps * defines["TOKENS"] * 128
    rows = row_warps * defines["FRAGMENTS"] * 16
    rings = column_warps * rows * defines["STAGES"] * defines["LINE"]
    given = (column_warps - 1) * rows * defines["TOKENS"] * 4
    if (split := defines["SPLIT"]) > 1:
        warp_bytes = defines["FRAGMENTS"] * 16 * defines["TOKENS"] * 4
        kept = max(warp_bytes // min(column_warps, warp_bytes // 512) // split, 512)
        given = (split - 1) * row_warps * min(column_warps, warp_bytes // 512) * kept
    gap_bytes = (256 - 8 - 5) * 128  # without map, offset and barriers
    return 256 * 256 + x_bytes + rings + (given if given > gap_bytes else 0)


def test_steps_are_whole_blocks_of_a_line(gpu):
    for kind, _, _, plan in plans(gpu):
        defines = dict(plan.defines)
        columns = defines["LINE"] * 8 // BITS[defines["FORMAT"]]
        if plan.tuning.x_stages:
            assert defines["X_STAGES"] % (columns // 64) == 0
        else:
            assert columns % defines["X_COLUMNS"] == 0 and defines["X_COLUMNS"] % 64 == 0, kind


def test_thread_blocks_share_all_units_and_have_room_for_their_sums(gpu):
    for kind, rows, tokens, plan in plans(gpu):
        defines, tuning = dict(plan.defines), plan.tuning
        columns = defines["LINE"] * 8 // BITS[defines["FORMAT"]] * tuning.column_warps
        tiles = -(-rows // (tuning.row_warps * tuning.fragments * 16))
        assert plan.num_units == tiles * -(-kind.columns // columns)
        assert 1 <= plan.num_blocks <= min(gpu.multiprocessors, plan.num_units)
        assert plan.num_blocks * tuning.warps * 4 <= COUNTER_BYTES
        if tuning.split > 1:
            assert plan.num_blocks == tiles * tuning.split and plan.sum_bytes == 0
            assert plan.block_values * tuning.split >= kind.columns * tuning.rows
        else:
            assert plan.sum_bytes == plan.num_blocks * 2 * tuning.rows * tokens * 4


def test_warps_that_multiply_in_groups_are_whole_groups():
    for tuning in itertools.chain(*GROUP_TUNINGS.values()):
        assert tuning.x_stages % 4 == 0 and tuning.row_warps % 4 == 0
    assert not any(tuning.x_stages for tuning in itertools.chain(*TUNINGS.values()))
    assert not multiplies_in_groups(LinearKind("nf4", 4096, "BF16", 32))
    assert not multiplies_in_groups(LinearKind("int8", 4096, "BF16"))


def test_a_tuning_without_room_makes_no_plan():
    gpu = SharedMemory(99 << 10, 100 << 10, 84)
    assert plan_with(Tuning(8, 1, 2, 3), LinearKind("nf4", 4096, "BF16"), 4096, 16, gpu) is None


def test_a_gpu_with_too_little_shared_memory_is_refused():
    gpu = SharedMemory(64 << 10, 64 << 10, 40)
    with pytest.raises(ValueError, match="65536 bytes of shared memory are too few for products"):
        specialise(LinearKind("nf4", 4096, "BF16"), 4096, 16, gpu)


KIND = LinearKind("nf4", 4096, "BF16")
HOPPER = SharedMemory(227 << 10, 228 << 10, 132)


@pytest.mark.parametrize(
    ("kind", "max_tokens", "message"),
    [
        (KIND, 0, "0 tokens, the kernel takes 1 to 64"),
        (KIND, 65, "65 tokens, the kernel takes 1 to 64"),
        (LinearKind("int8", 100, "BF16"), 16, "100 columns are no multiple of 64"),
        (LinearKind("nf4", 4096, "BF16", norm="rms"), 16, "a layer alone"),
        (LinearKind("nf4", 4096, "BF16", epilogue="residual"), 16, "a layer alone"),
    ],
)
def test_launches_that_the_kernel_does_not_take(kind, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        LinearSome(kind, LinearWeight(256, 1 << 20), max_tokens=max_tokens)


@pytest.mark.parametrize("columns", [4096, 1408])
def test_the_copy_engine_is_told_of_the_tokens_once(columns, monkeypatch):
    """A map lies where the kernel's arguments begin; one that is still right is not made again.

    Of whole chunks of 256 columns a copy brings blocks of several at once.
    """
    made, launched = [], []

    def encode(target, dtype, rank, x, sizes, strides, box, *_):
        assert target % 64 == 0 and dtype == 1
        assert len(sizes) == len(strides) + 1 == len(box) == rank
        made.append((x, tuple(sizes), tuple(strides), tuple(box)))
        ctypes.memset(target, len(made), 128)
        return 0

    class Launch:
        def __init__(self, kernel, grid, threads, shared_bytes, arguments, *, overlap):
            self.arguments = arguments

        def __call__(self, stream):
            launched.append(bytes(self.arguments)[:128])

    monkeypatch.setattr(token_map, "_encode", lambda: encode)
    token_map._encoded.cache_clear()
    monkeypatch.setattr(linear_some, "Launch", Launch)
    monkeypatch.setattr(Plan, "load", lambda _: None)
    kind = LinearKind("nf4", columns, "BF16")
    plan = specialise(kind, 4096, 64, HOPPER, has_warpgroups=True)
    launch = LinearSome(kind, LinearWeight(4096, 1 << 20), max_tokens=64, plan=plan)
    for count in (40, 40, 64, 1):
        tokens = Tokens(count, 1 << 16, 1 if count == 1 else 4104, (1 << 24,), (4096,))
        launch.queue(tokens, 0, counters=1 << 12, sums=1 << 12)
    if columns == 4096:
        box = (64, 64, plan.tuning.column_warps, 1)
        expected = [((64, n, 16, 4), (apart, 512, 128), box) for n, apart in CASES_OF_TOKENS]
    else:
        expected = [((1408, n), (min(apart, n * 2816),), (64, 64)) for n, apart in CASES_OF_TOKENS]
    assert [words[1:] for words in made] == expected
    assert [words[0] for words in launched] == [1, 1, 2, 3]
    monkeypatch.setattr(launch, "_map", None)  # not called for what it was told last
    launch.queue(tokens, 0, counters=1 << 12, sums=1 << 13)
    assert launch._launch.arguments.partials == 1 << 13 and len(launched) == 5


CASES_OF_TOKENS = ((40, 8208), (64, 8208), (1, 8192))  # and bytes from one to the next


def test_arguments_of_groups_fill_what_the_kernel_reads():
    """The driver reads a multiple of 64 bytes, as a map is aligned."""
    used = linear_some._GroupArguments.padding.offset
    assert ctypes.sizeof(linear_some._GroupArguments) >= -(-used // 64) * 64
    assert linear_some._GroupArguments.layers.offset == token_map.MAP_BYTES


def test_one_block_for_each_tile_leaves_no_sums():
    plan = specialise(KIND, 132 * 256, 64, HOPPER, has_warpgroups=True)
    assert plan.shared_sums == 0 and plan.num_blocks == 132


H200_CLUSTERS = {2: 66, 4: 30}  # that run at once


def on_h200(plan):
    return plan.num_blocks // plan.tuning.split <= H200_CLUSTERS[plan.tuning.split]


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile_rows", "split"),
    [
        (64, 28672, 4096, 64, 1),
        (64, 8192, 28672, 128, 2),
        (64, 4096, 14336, 64, 2),
        (64, 4096, 4096, 64, 2),
        (64, 6144, 4096, 128, 2),
        (64, 8192, 8192, 128, 2),
        (64, 5120, 5120, 192, 4),
        (64, 2048, 2048, 64, 2),
        (16, 28672, 4096, 64, 1),
        (16, 8192, 28672, 128, 2),
        (16, 4096, 14336, 64, 2),
        (16, 4096, 4096, 64, 2),
        (16, 6144, 4096, 128, 2),
        (16, 8192, 8192, 128, 2),
        (16, 2048, 2048, 64, 2),
    ],
)
def test_what_was_fastest_on_an_h200_is_chosen(tokens, rows, columns, tile_rows, split):
    kind = LinearKind("nf4", columns, "BF16", nested=True)
    plan = specialise(kind, rows, tokens, HOPPER, has_warpgroups=True, runs_at_once=on_h200)
    assert (plan.tuning.rows, plan.tuning.split) == (tile_rows, split)
    assert dict(plan.defines)["SPLIT"] == split


@pytest.mark.parametrize("tiles", [66, 67])
def test_clusters_have_no_more_blocks_than_run_at_once(tiles):
    kind = LinearKind("nf4", 8192, "BF16")
    plan = specialise(kind, tiles * 128, 64, HOPPER, has_warpgroups=True, runs_at_once=on_h200)
    assert plan.tuning.split == (2 if tiles == 66 else 1)


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_each_block_of_a_cluster_has_columns(tokens):
    kind = LinearKind("nf4", 256, "BF16")
    plan = specialise(kind, 4096, tokens, HOPPER, has_warpgroups=True)
    assert plan.tuning.split == 1


@pytest.mark.parametrize(("room", "split"), [(64, 2), (15, 1)])
def test_clusters_that_do_not_run_at_once_are_not_used(room, split, monkeypatch):
    class Launch:
        def __init__(self, *_, **__):
            pass

        def count_clusters(self, size):
            return room

    monkeypatch.setattr(linear_some, "Launch", Launch)
    monkeypatch.setattr(linear_some, "shared_memory", lambda _: HOPPER)
    monkeypatch.setattr(linear_some, "compiles_for", lambda _: True)
    monkeypatch.setattr(Plan, "load", lambda _: None)
    plan = linear_some._plan_on.__wrapped__(KIND, 4096, 64, 0)
    assert plan.tuning.split == split
