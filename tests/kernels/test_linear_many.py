"""How linear_many.cu is chosen and shaped, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cupy_kernels import linear_many
from cupy_kernels.inventory import SHARED_KIB
from cupy_kernels.launch import Gpu
from cupy_kernels.linear_few import LinearKind, LinearWeight, Tokens
from cupy_kernels.linear_many import (
    SHAPES,
    LinearMany,
    can_be_handed_over,
    choose_shape,
    estimate_clocks,
)

KIND = LinearKind("nf4", 4096, "BF16", nested=True)
H200 = Gpu(multiprocessors=132, can_overlap=True)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(linear_many, "compiles_for", lambda target: target == "sm_90")
    monkeypatch.setattr(linear_many, "current_gpu", lambda: H200)


def test_shared_memory_is_what_the_source_lays_out_and_hopper_has_it():
    for shape, bits in itertools.product(SHAPES, (4, 8)):
        table_bytes = 256 * 32 * 8 if bits == 4 else 0
        x_bytes, packed_bytes = shape.tokens * 64 * 2, 128 * 64 * bits // 8
        stages = 8 if shape.tokens == 128 and bits == 8 else 4
        ring_bytes = stages * (x_bytes + packed_bytes)
        # Scales of two chunks; results of a tile, where they are not put into the ring.
        scales_bytes = 2 * 128 * 4 * 4 if bits == 4 else 0
        results_bytes = 128 * 256 * 2 if bits == 8 and shape.hands_over else 0
        barriers = 2 * stages + 2 * 2 + 2 * 2
        end = table_bytes + ring_bytes + scales_bytes + results_bytes + barriers * 8
        assert shape.shared_bytes(bits) == end <= SHARED_KIB["sm_90"][0] << 10


def test_the_shape_that_fills_the_gpu_is_chosen():
    # 64 tiles of 256 tokens would leave half of the thread blocks idle: they share columns.
    assert (choose_shape((4096,), 4096, 512, 132).tokens) == 256
    assert (choose_shape((4096,), 4096, 512, 132).split) == 2
    # Enough tiles for all: none is shared.
    assert choose_shape((28672,), 4096, 2048, 132).split == 1
    # A hundred tokens do not fill tiles of 256.
    assert choose_shape((28672,), 4096, 100, 132).tokens == 128


@pytest.mark.parametrize("multiprocessors", [114, 132])
def test_the_least_time_is_chosen(multiprocessors):
    for rows, columns, tokens in itertools.product(
        ((4096,), (4096, 1024, 1024), (14336, 14336)), (256, 4096, 14336), (65, 512, 4096)
    ):
        times = [estimate_clocks(shape, rows, columns, tokens, multiprocessors) for shape in SHAPES]
        chosen = choose_shape(rows, columns, tokens, multiprocessors)
        assert estimate_clocks(chosen, rows, columns, tokens, multiprocessors) == min(times)


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
