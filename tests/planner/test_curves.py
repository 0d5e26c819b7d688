"""Memory against context: which contexts are shown, and that the curves are the plans' own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from qtool.planner.curves import REACH, ContextCurves, context_curves
from qtool.planner.estimate import EstimateRequest, estimate_opened
from qtool.planner.gpus import resolve_gpus
from qtool.planner.memory import MemoryBudget
from qtool.planner.model import PlannedModel, open_model
from qtool.planner.records import Workload
from qtool.planner.reference_models import reference_models
from tests.tiny_models import write_llama

WORKLOAD = Workload(context=4096)


def reference(size: str) -> PlannedModel:
    return next(model for model in reference_models() if model.size == size).describe()


def curves_of(model: PlannedModel, **options) -> ContextCurves:
    options["gpus"] = resolve_gpus(options.pop("gpus", ()))
    request = EstimateRequest("", **{key: options[key] for key in options if key != "gpus"})
    return context_curves(model, estimate_opened(model, options["gpus"], request))


@pytest.mark.parametrize(
    "workload",
    [WORKLOAD, replace(WORKLOAD, batch=3, runtime="vllm"), replace(WORKLOAD, gpus=2)],
    ids=["one", "vllm", "two GPUs"],
)
def test_every_point_is_the_plan_of_its_context(workload):
    model = reference("8B")
    curves = curves_of(model, workload=workload, quants=("bf16", "nf4"))
    assert [curve.quant for curve in curves.precisions] == ["bf16", "nf4"]
    for curve in curves.precisions:
        budget = MemoryBudget.of(model, curve.quant, workload)
        for point in curve.points[::10]:
            plan = budget.plan(replace(workload, context=point.context))
            assert point.peak_bytes == plan.peak_bytes
            assert (point.low_bytes, point.high_bytes) == (
                plan.peak_low_bytes,
                plan.peak_high_bytes,
            )


def test_contexts_rise_evenly_over_the_octaves_to_the_model_s_own():
    curves = curves_of(reference("8B"))
    contexts = curves.contexts
    assert (contexts[0], contexts[-1]) == (256, 131_072)
    assert 60 <= len(contexts) <= 64
    ratios = [after / before for before, after in pairwise(contexts)]
    assert min(ratios) > 1 and max(ratios) < 1.13
    assert {curve.points[5].context for curve in curves.precisions} == {contexts[5]}


def test_the_context_asked_for_is_a_point_even_beyond_the_model_s_own():
    curves = curves_of(reference("8B"), context=5000)
    assert curves.workload.context == 5000 and 5000 in curves.contexts
    assert curves_of(reference("14B"), context=50_001).contexts[-1] == 50_001  # made for 40,960


def test_a_model_of_short_contexts_has_a_curve_too(tmp_path):
    write_llama(tmp_path)
    curves = curves_of(open_model(str(tmp_path)))
    assert (curves.contexts[0], curves.contexts[-1]) == (8, 128)
    shortest = curves_of(open_model(str(tmp_path)), context=1)
    assert shortest.contexts[0] == 1


def test_a_context_that_nobody_can_hold_is_not_shown():
    config = {**reference("1B").config, "max_position_embeddings": 10_000_000}
    described = replace(reference_models()[0], config=config).describe()
    curves = curves_of(described, gpus=("RTX 4090",), quants=("bf16", "nf4-dq"))
    last_bytes = min(curve.points[-1].peak_bytes for curve in curves.precisions)
    reached = last_bytes / curves.limits[0].usable_bytes
    assert REACH * 0.999 < reached <= REACH
    wider = curves_of(described, gpus=("RTX 4090", "H200"), quants=("bf16", "nf4-dq"))
    assert wider.contexts[-1] > curves.contexts[-1]


def test_a_model_whose_cache_is_not_known_gives_level_lines(tmp_path):
    config = write_llama(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace(config["model_type"], "unheard_of"))
    curves = curves_of(open_model(str(tmp_path)))
    assert len(curves.contexts) > 60
    for curve in curves.precisions:
        assert len({point.peak_bytes for point in curve.points}) == 1


def test_limits_are_what_the_fits_say_and_so_is_the_longest_context():
    curves = curves_of(
        reference("8B"), gpus=("RTX 4090", "H200"), headroom_percent=10, quants=("bf16", "nf4")
    )
    assert [limit.name for limit in curves.limits] == ["RTX 4090", "H200 SXM"]
    for curve in curves.precisions:
        budget = MemoryBudget.of(reference("8B"), curve.quant, WORKLOAD)
        for limit, longest in zip(curves.limits, curve.longest, strict=True):
            peak_bytes = budget.peak_bytes(replace(WORKLOAD, context=longest))
            assert peak_bytes <= limit.usable_bytes
    assert curves.precisions[0].longest[0] < curves.precisions[1].longest[0]
    assert curves.precisions[1].longest[1] == 131_072
