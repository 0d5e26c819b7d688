"""How linear_many.cu is chosen and shaped, without a GPU."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from cupy_kernels import linear_many
from cupy_kernels.inventory import SHARED_KIB
from cupy_kernels.linear_few import LinearKind, LinearWeight, Tokens
from cupy_kernels.linear_many import (
    SHAPES,
    LinearMany,
    band_of,
    can_be_handed_over,
    choose_plan,
)

KIND = LinearKind("nf4", 4096, "BF16", nested=True)
H200_MULTIPROCESSORS = 132


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(linear_many, "compiles_for", lambda target: target == "sm_90")
    monkeypatch.setattr(linear_many, "num_multiprocessors", lambda: H200_MULTIPROCESSORS)


def test_shared_memory_is_what_the_source_lays_out_and_hopper_has_it():
    for shape, bits in itertools.product(SHAPES, (4, 8)):
        stages = 8 if shape.tokens == 128 else 4
        # Tokens and packed weights; with 4 bit 16 values of each row, and maps of three layers.
        stage_bytes = (
            shape.tokens * 64 * 2 + 128 * 64 * bits // 8 + (128 * 16 * 2 if bits == 4 else 0)
        )
        maps_bytes = 3 * 256 * 4 if bits == 4 else 0
        # Results of a tile, where they are not put into the ring.
        results_bytes = 128 * 256 * 2 if bits == 8 and shape.hands_over else 0
        barriers = 2 * stages + 2 * 2
        end = stages * stage_bytes + maps_bytes + results_bytes + barriers * 8
        assert shape.shared_bytes(bits) == end <= SHARED_KIB["sm_90"][0] << 10


def select_bytes(first, second, selected):
    """The instruction prmt, by its definition; `selected` of any shape."""
    both = first | second << 32
    found = np.zeros_like(selected)
    for i in range(4):
        digit = selected >> 4 * i & 15
        byte = both >> 8 * (digit & 7) & 0xFF
        found |= np.where(digit < 8, byte, (byte >> 7) * 0xFF) << 8 * i
    return found


def test_four_codes_at_a_time_find_their_values_by_bytes():
    """As `CodeBytes` and `look_up_row` do, with the numbers in the source."""
    source = files("cupy_kernels").joinpath("linear_many.cu").read_text()
    flipped, signs = (
        np.uint64(int(digits, 16))
        for digits in re.findall(
            r"0x(\w{4})u", re.search(r"CodeBytes\(uint32.*?}", source, re.S)[0]
        )
    )
    first, second = (
        np.uint64(int(digits, 16))
        for digits in re.findall(r"select_bytes\(low, high, 0x(\w{4})u", source)
    )
    values = np.random.default_rng(0).integers(0, 1 << 16, 16, np.uint64)
    codes = np.arange(1 << 16, dtype=np.uint64)
    are_from_8_on = select_bytes(codes, codes << 4, np.full_like(codes, signs))
    found = []
    for shift in (0, 8):
        words = [
            sum(int(values[4 * i + j] >> shift & 0xFF) << 8 * j for j in range(4)) for i in range(4)
        ]
        below, above = np.array(words, np.uint64).reshape(2, 2)
        below_8 = select_bytes(*below, codes)
        from_8_on = select_bytes(*above, codes ^ flipped)
        found.append((are_from_8_on & from_8_on) | (~are_from_8_on & below_8) & 0xFFFFFFFF)
    for i, selected in enumerate((first, second)):
        pair = select_bytes(*found, np.full_like(codes, selected))
        upper, lower = values[codes >> (8 * i + 4) & 15], values[codes >> 8 * i & 15]
        assert (pair == (upper | lower << 16)).all()


def test_the_shape_that_fills_the_gpu_is_chosen():
    # 64 tiles of 256 tokens would leave half of the thread blocks idle: they share columns.
    plan = choose_plan((4096,), 4096, 512, 132)
    assert (plan.shape.tokens, plan.num_tiles, plan.num_shared) == (256, 64, 64)
    # 448 are three for each, and 52, of which each is one for two.
    plan = choose_plan((28672,), 4096, 512, 132)
    assert (plan.shape.tokens, plan.num_tiles, plan.num_shared) == (256, 448, 52)
    # 13 for each, and 76, which 66 pairs would not have at once.
    assert choose_plan((28672,), 4096, 2048, 132).num_shared == 0
    # A hundred tokens do not fill tiles of 256.
    assert choose_plan((28672,), 4096, 100, 132).shape.tokens == 128


def test_one_chunk_of_columns_is_not_shared():
    assert choose_plan((4096,), 256, 512, 132).num_shared == 0


@pytest.mark.parametrize("multiprocessors", [114, 132])
def test_the_least_time_is_chosen(multiprocessors):
    for rows, columns, tokens in itertools.product(
        ((4096,), (4096, 1024, 1024), (14336, 14336)), (256, 4096, 14336), (65, 512, 4096)
    ):
        plans = [choose_plan(rows, columns, tokens, multiprocessors, (shape,)) for shape in SHAPES]
        chosen = choose_plan(rows, columns, tokens, multiprocessors)
        assert chosen in plans and chosen.clocks == min(plan.clocks for plan in plans)


@pytest.mark.usefixtures("on_hopper")
def test_some_hundred_tokens_are_faster_than_to_dequantize_and_many_thousands_are_not():
    for rows in ((4096, 1024, 1024), (14336, 14336), (4096,)):
        assert all(linear_many.is_faster(KIND, rows, tokens) for tokens in (65, 128, 512, 1024))
        assert not linear_many.is_faster(KIND, rows, 16_384)


@pytest.mark.usefixtures("on_hopper")
def test_int8_needs_no_table_and_is_faster_for_longer():
    int8 = LinearKind("int8", 4096, "BF16")
    tokens = [64 * step for step in range(2, 256)]
    wins = [
        sum(linear_many.is_faster(kind, (4096,), count) for count in tokens)
        for kind in (KIND, int8)
    ]
    assert wins[0] < wins[1]


@pytest.mark.usefixtures("on_hopper")
def test_layers_that_do_not_fit():
    assert linear_many.fits(KIND)
    assert linear_many.fits(LinearKind("int8", 4096, "F16"))
    others = (
        {"format": "plain"},
        {"columns": 4096 + 64},
        {"blocksize": 32},
        {"norm": "rms"},
        {"epilogue": "gated"},
        {"adapted": True},
    )
    for other in others:
        assert not linear_many.fits(replace(KIND, **other)), other


def test_other_gpus_have_no_such_instructions(monkeypatch):
    monkeypatch.setattr(linear_many, "compiles_for", lambda target: target == "sm_100")
    assert not linear_many.fits(KIND)


def test_only_whole_parts_of_16_bytes_are_handed_over():
    fits = Tokens(100, 0, 64, (1024, 2048), (512, 520), residual=4, residual_stride=512)
    assert can_be_handed_over((512, 8), fits)
    assert not can_be_handed_over((512, 12), fits)
    for other in (
        {"outs": (1024, 2056)},
        {"out_strides": (512, 524)},
        {"residual": 2},
        {"residual_stride": 513},
    ):
        assert not can_be_handed_over((512, 8), replace(fits, **other)), other


@pytest.mark.parametrize("count", [0, 4])
def test_a_launch_takes_one_to_three_layers(count):
    with pytest.raises(ValueError, match=f"{count} layers, a launch takes 1 to 3"):
        LinearMany(KIND, [LinearWeight(128, 16)] * count, 512)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_blocks", [78, 114, 132])
def test_tiles_that_run_at_once_read_few_different_bytes(num_blocks, bits):
    for shape in SHAPES:

        def bytes_of(band, shape=shape):  # of a column
            return band * 128 * bits / 8 + num_blocks / band * shape.tokens * 2

        band = band_of(shape, bits, num_blocks)
        assert band >= 1
        assert bytes_of(band) <= 1.01 * min(map(bytes_of, range(1, 10 * num_blocks)))
