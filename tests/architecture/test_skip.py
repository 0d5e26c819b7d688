"""Skip patterns match exactly as transformers matches them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from qtool.architecture.skip import default_skips, first_match, is_skipped
from qtool.errors import QtoolError

PARTS = ["model", "layers", "0", "1", "11", "mlp", "q_proj", "up_proj", "lm_head", "gate"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
PATTERNS = st.lists(
    st.one_of(
        NAMES,
        st.sampled_from(["layers.1", "proj", ".*", r"model\.layers\.[0-9]+", "mlp|gate", "", "l"]),
        st.text("mlp.*_01(|+", max_size=6),
    ),
    max_size=4,
)


@given(NAMES, PATTERNS, st.integers(0, 20))
def test_matching_is_transformers_own(name, patterns, cut):
    patterns = [*patterns, name[:cut] or "x"]  # a beginning that may end inside a component
    try:
        expected = not should_convert_module(name, patterns)
    except re.error:
        with pytest.raises(QtoolError) as caught:
            is_skipped(name, patterns)
        assert caught.value.kind == "usage"
        return
    assert is_skipped(name, patterns) is expected


@pytest.mark.parametrize(
    ("name", "pattern", "skipped"),
    [
        ("model.layers.1.mlp", "model.layers.1", True),
        ("model.layers.11.mlp", "model.layers.1", False),
        ("model.decoder.layers.23.fc1", "fc1", True),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate", False),
        ("lm_head", "lm_head", True),
        ("model.layers.0.q_proj", "layers.0", False),
    ],
)
def test_boundaries(name, pattern, skipped):
    assert is_skipped(name, [pattern]) is skipped
    assert first_match(name, ["nothing", pattern]) == (pattern if skipped else None)


def test_a_pattern_that_is_no_regular_expression_is_a_usage_error():
    with pytest.raises(
        QtoolError, match=r"skip pattern '\(' is not a regular expression"
    ) as caught:
        is_skipped("lm_head", ["("])
    assert caught.value.kind == "usage"


def test_the_default_rule_keeps_ties_the_last_parameter_and_the_head():
    assert default_skips([], "lm_head.weight", "lm_head.weight") == ("lm_head",)
    assert default_skips([("lm_head.weight", "wte.weight")], "ln_f.bias", "lm_head.weight") == (
        "lm_head",
        "ln_f.bias",
        "wte",
    )
    assert default_skips([], "score.weight", None) == ("score",)
