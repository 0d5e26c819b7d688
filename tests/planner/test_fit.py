"""Verdicts, limits found by bisection, and suggestions that do what they say."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.planner.fit import (
    fit,
    largest_batch,
    longest_context,
    usable_bytes,
    verdict,
)
from qtool.planner.gpus import vram_class
from qtool.planner.memory import MemoryBudget
from qtool.planner.records import Workload
from qtool.planner.reference_models import reference_models
from qtool.planner.suggestions import suggest
from tests.planner.plans import budget_of

GIB = 1 << 30
QUANTS = ("bf16", "int8", "nf4-dq")


@functools.cache
def budget(size="8B", quant="nf4-dq"):
    (model,) = (model for model in reference_models() if model.size == size)
    return budget_of(model.describe(), quant)


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
    longest = longest_context(model, Workload(4096, batch), available)
    assert 0 <= longest <= model.max_context
    if longest:
        assert model.peak_bytes(Workload(longest, batch)) <= available
    if longest < model.max_context:
        assert model.peak_bytes(Workload(longest + 1, batch)) > available


@given(
    quant=st.sampled_from(QUANTS),
    context=st.integers(1, 131_072),
    available=st.integers(1 * GIB, 300 * GIB),
)
def test_largest_batch_fits_and_one_sequence_more_does_not(quant, context, available):
    model = budget(quant=quant)
    largest = largest_batch(model, Workload(context), available)
    if largest:
        assert model.peak_bytes(Workload(context, largest)) <= available
    assert model.peak_bytes(Workload(context, largest + 1)) > available


def test_nothing_limits_a_model_of_which_only_the_weights_are_known():
    unknown = replace(budget().model, architecture=None)
    weights_only, workload = replace(budget(), model=unknown, layer=None), Workload(4096)
    for limit in (longest_context, largest_batch):
        assert limit(weights_only, workload, 100 * GIB) is None
        assert limit(weights_only, workload, 1 * GIB) == 0


@given(gib=st.floats(6, 200), context=st.integers(1, 131_072), batch=st.integers(1, 16))
def test_more_memory_never_fits_less(gib, context, batch):
    plan = budget().plan(Workload(context, batch))
    small, large = (fit(budget(), plan, vram_class(size)) for size in (gib, 1.2 * gib))
    order = ["no", "tight", "yes"]
    assert order.index(small.verdict) <= order.index(large.verdict)
    assert small.max_context <= large.max_context and small.max_batch <= large.max_batch


# -- suggestions ----------------------------------------------------------------------------------


def suggestions(quant, gibs, context=4096, batch=1):
    model = budget(quant=quant)
    plan = model.plan(Workload(context, batch))
    others = [budget(quant=other).plan(Workload(context, batch)) for other in QUANTS]
    fits = [fit(model, plan, vram_class(gib)) for gib in gibs]
    return plan, suggest(model, plan, fits, others)


def after(change, quant, workload):
    """(precision, workload) after a suggested change."""
    words = change.split()
    if words[0] in ("context", "batch"):
        assert words[1] == str(getattr(workload, words[0]))
        return quant, replace(workload, **{words[0]: int(words[-1])})
    if words[1:] == ["GPUs"]:
        return quant, replace(workload, gpus=int(words[0]))
    return change, workload


@pytest.mark.parametrize(
    ("quant", "gib", "context", "batch", "expected"),
    [
        ("bf16", 12, 4096, 1, ["int8", "nf4-dq", "2 GPUs", "12 of 32 layers in CPU memory"]),
        ("bf16", 8, 4096, 1, ["nf4-dq", "4 GPUs", "22 of 32 layers in CPU memory"]),
        ("nf4-dq", 8, 32_768, 1, ["context", "2 GPUs", "23 of 32 layers in CPU memory"]),
        ("nf4-dq", 12, 4096, 16, ["context", "batch", "2 GPUs"]),
        ("bf16", 16, 32_768, 4, ["4 GPUs"]),
        ("nf4-dq", 2, 4096, 1, []),
    ],
)
def test_suggestions_are_the_changes_that_help(quant, gib, context, batch, expected):
    plan, found = suggestions(quant, [2, gib], context, batch)
    assert len(found) == len(expected), found
    available = vram_class(gib).usable_bytes
    for suggestion, start in zip(found, expected, strict=True):
        assert suggestion.change.startswith(start)
        peak_bytes = plan.peak_bytes - suggestion.saves_bytes
        assert peak_bytes <= available
        if "CPU memory" in suggestion.change:
            continue
        precision, workload = after(suggestion.change, quant, plan.workload)
        (model,) = (model for model in reference_models() if model.size == "8B")
        again = MemoryBudget.of(model.describe(), precision, workload)
        assert again.peak_bytes(workload) == peak_bytes
        if start == "context":
            assert workload.context % 256 == 0
            assert again.peak_bytes(replace(workload, context=workload.context + 256)) > available
        if start == "batch":
            assert again.peak_bytes(replace(workload, batch=workload.batch + 1)) > available


def test_no_suggestions_where_a_gpu_fits_already():
    assert suggestions("bf16", [8, 24])[1] == ()


def test_without_gpus_the_smaller_precisions_are_suggested():
    assert [s.change for s in suggestions("int8", [])[1]] == ["nf4-dq"]
    assert suggestions("nf4-dq", [])[1] == ()
