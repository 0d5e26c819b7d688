"""Every counted published config: the same model, tensor by tensor, as transformers builds."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from qtool.architecture import Architecture, RecurrentState, build_architecture
from tests.architecture import oracle

CONFIGS = oracle.published_configs()

pytestmark = pytest.mark.usefixtures("test_data")  # skips, with the count, where it is missing


@pytest.fixture(scope="module", params=CONFIGS or [None], ids=lambda path: path and path.name)
def built(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Architecture, oracle.Model]:
    """One config, our architecture and transformers' model; one model in memory at a time."""
    path: Path | None = request.param
    if path is None:
        pytest.skip("QTOOL_TEST_DATA is not set")
    counts = json.loads((path.parent / "COUNTS.json").read_text())[path.name]["counts"]
    config = json.loads((path / "config.json").read_text())
    return counts, build_architecture(config), oracle.build_model(config, counts["cls"])


def test_names_shapes_and_order_are_the_models_own(built):
    _, ours, model = built
    assert list(oracle.parameters(model).items()) == [
        (name, tensor.shape) for name, tensor in ours.tensors.items()
    ]


def test_tied_weights_and_the_count_of_parameters_agree(built):
    counts, ours, model = built
    ties = {t.name: t.tied_to for t in ours.tensors.values() if t.tied_to is not None}
    assert ties == oracle.tied(model)
    assert ours.num_parameters == counts["params"]
    assert ours.tied_embeddings == counts["tied"]
    assert ours.class_name == counts["cls"]


def test_linear_layers_are_counted_as_published(built):
    counts, ours, _ = built
    linear = [
        t for t in ours.tensors.values() if t.is_linear and not t.module_name.endswith("lm_head")
    ]
    assert len(linear) == counts["linear_modules"]
    assert sum(t.shape[0] * t.shape[1] for t in linear) == counts["linear"]


def test_routed_experts_are_counted_as_published_and_their_share_is_active(built):
    counts, ours, model = built
    experts = [t for t in ours.tensors.values() if t.kind.startswith("experts")]
    assert sum(math.prod(t.shape) for t in experts) == counts["experts3d"]
    assert (ours.experts is None) == (counts["experts3d"] == 0)
    if ours.experts is None:
        assert ours.num_active_parameters == ours.num_parameters
        return
    idle = oracle.expert_parameters(model) * (
        1 - Fraction(ours.experts.experts_per_token, ours.experts.num_experts)
    )
    assert ours.num_active_parameters == ours.num_parameters - idle


def test_the_cache_layers_that_slide_are_the_models_own(built):
    _, ours, model = built
    assert [
        getattr(layer, "window", None)
        for layer in ours.cache_layers
        if not isinstance(layer, RecurrentState)
    ] == oracle.cache_windows(model)


def test_the_default_rule_names_the_same_modules(built):
    _, ours, model = built
    assert set(ours.skipped_modules) == oracle.default_skips(model)
    assert list(ours.skipped_modules) == sorted(set(ours.skipped_modules))


@pytest.mark.parametrize(
    "skip", [["down_proj", "c_proj"], [r"model\.layers\.[01]"], ["model.layers.1", "visual"]]
)
def test_the_replaced_set_agrees_with_skip_patterns(built, skip):
    _, ours, model = built
    assert set(ours.replaced(skip)) == oracle.would_replace(model, skip)
    expected = oracle.would_replace(model, [*ours.skipped_modules, *skip])
    assert set(ours.quantizable(skip)) == expected
    # What quantize writes to config.json: full names, on which every loader's matching agrees.
    written_out = ours.explicit_skips(skip)
    assert oracle.would_replace(model, written_out) == expected
    by_prefix = re.compile("|".join(map(re.escape, written_out)))
    assert {w for w in oracle.would_replace(model, []) if not by_prefix.match(w)} == expected


def test_the_replaced_set_agrees_by_default_and_when_the_list_is_written_out(built):
    _, ours, model = built
    # A list in llm_int8_skip_modules stands in for the default rule when the folder is loaded.
    assert ours.explicit_skips() == ours.skipped_modules
    written_out = oracle.would_replace(model, ours.skipped_modules)
    assert set(ours.quantizable()) == written_out
    assert written_out == oracle.replaced(model)  # replaces in place: the last test of a config
