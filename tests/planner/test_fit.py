"""Verdicts, limits found by bisection, and suggestions that do what they say."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.planner.fit import fit, largest_batch, longest_context, suggest, usable_bytes, verdict
from qtool.planner.gpus import vram_class
from qtool.planner.memory import MemoryBudget
from qtool.planner.reference_models import reference_models

GIB = 1 << 30
QUANTS = ("bf16", "int8", "nf4-dq")


@functools.cache
def budget(size="8B", quant="nf4-dq"):
    (model,) = (model for model in reference_models() if model.size == size)
    return MemoryBudget.of(model.describe(), quant)


@pytest.mark.parametrize(
    ("peak", "available", "expected"),
    [(0, 100, "yes"), (95, 100, "yes"), (96, 100, "tight"), (100, 100, "tight"), (101, 100, "no")],
)
def test_verdicts(peak, available, expected):
    assert verdict(peak, available) == expected


def test_headroom_is_taken_from_usable_memory():
    gpu = vram_class(24)
    assert usable_bytes(gpu, 0) == gpu.usable_bytes
    assert usable_bytes(gpu, 25) == int(gpu.usable_bytes * 0.75)


@given(
    quant=st.sampled_from(QUANTS),
    batch=st.integers(1, 64),
    available=st.integers(1 * GIB, 300 * GIB),
)
def test_longest_context_fits_and_one_token_more_does_not(quant, batch, available):
    model = budget(quant=quant)
    longest = longest_context(model, batch, available)
    assert 0 <= longest <= model.max_context
    if longest:
        assert model.peak_bytes(context=longest, batch=batch) <= available
    if longest < model.max_context:
        assert model.peak_bytes(context=longest + 1, batch=batch) > available


@given(
    quant=st.sampled_from(QUANTS),
    context=st.integers(1, 131_072),
    available=st.integers(1 * GIB, 300 * GIB),
)
def test_largest_batch_fits_and_one_sequence_more_does_not(quant, context, available):
    model = budget(quant=quant)
    largest = largest_batch(model, context, available)
    if largest:
        assert model.peak_bytes(context=context, batch=largest) <= available
    assert model.peak_bytes(context=context, batch=largest + 1) > available


def test_nothing_limits_a_model_of_which_only_the_weights_are_known():
    from dataclasses import replace

    weights_only = replace(budget(), layer=None, max_context=None)
    assert longest_context(weights_only, 1, 100 * GIB) is None
    assert largest_batch(weights_only, 4096, 100 * GIB) is None
    assert longest_context(weights_only, 1, 1 * GIB) == 0 == largest_batch(weights_only, 1, 1 * GIB)


@given(gib=st.floats(6, 200), context=st.integers(1, 131_072), batch=st.integers(1, 16))
def test_more_memory_never_fits_less(gib, context, batch):
    plan = budget().plan(context=context, batch=batch)
    small, large = (fit(budget(), plan, vram_class(size)) for size in (gib, 1.2 * gib))
    order = ["no", "tight", "yes"]
    assert order.index(small.verdict) <= order.index(large.verdict)
    assert small.max_context <= large.max_context and small.max_batch <= large.max_batch


# -- suggestions ----------------------------------------------------------------------------------


def suggestions(quant, gibs, context=4096, batch=1):
    model = budget(quant=quant)
    plan = model.plan(context=context, batch=batch)
    others = [budget(quant=other).plan(context=context, batch=batch) for other in QUANTS]
    fits = [fit(model, plan, vram_class(gib)) for gib in gibs]
    return plan, suggest(model, plan, fits, others)


@pytest.mark.parametrize(
    ("quant", "gib", "context", "batch", "expected"),
    [
        ("bf16", 12, 4096, 1, ["--quant int8", "--quant nf4-dq"]),
        ("bf16", 8, 4096, 1, ["--quant nf4-dq"]),
        ("nf4-dq", 8, 32_768, 1, ["--context"]),
        ("nf4-dq", 12, 4096, 16, ["--context", "--batch"]),
        ("bf16", 16, 32_768, 4, []),  # no single step is enough
        ("nf4-dq", 4, 4096, 1, []),
    ],
)
def test_suggestions_are_the_changes_that_help(quant, gib, context, batch, expected):
    plan, found = suggestions(quant, [4, gib], context, batch)
    assert len(found) == len(expected)
    for suggestion, start in zip(found, expected, strict=True):
        assert suggestion.change.startswith(start)
        flag, value = suggestion.change.split()
        peak = functools.partial(
            budget(quant=value if flag == "--quant" else quant).peak_bytes,
            context=int(value) if flag == "--context" else context,
            batch=int(value) if flag == "--batch" else batch,
        )
        available = vram_class(gib).usable_bytes
        assert peak() <= available
        assert suggestion.saves_bytes == plan.peak_bytes - peak()
        if flag == "--context":
            assert int(value) % 256 == 0 and peak(context=int(value) + 256) > available
        if flag == "--batch":
            assert peak(batch=int(value) + 1) > available


def test_no_suggestions_where_a_gpu_fits_already():
    assert suggestions("bf16", [8, 24])[1] == ()


def test_without_gpus_the_smaller_precisions_are_suggested():
    assert [s.change for s in suggestions("int8", [])[1]] == ["--quant nf4-dq"]
    assert suggestions("nf4-dq", [])[1] == ()
