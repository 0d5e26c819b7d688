"""Sharing a model among GPUs: nothing is lost, and no stage is larger than it must be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.architecture import AttentionCache, LatentCache, RecurrentState
from qtool.planner.devices import pipeline_shares, tensor_share
from qtool.planner.inventory import AFTER, BEFORE
from qtool.planner.reference_models import reference_models
from tests.planner.plans import plan_of

GQA = AttentionCache(8, 128, 128)


def shares(layer_bytes, gpus, before=0, after=0):
    place_bytes = {**dict(enumerate(layer_bytes)), BEFORE: before, AFTER: after}
    return pipeline_shares(place_bytes, [GQA] * len(layer_bytes), len(layer_bytes), gpus)


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    st.integers(2, 9),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_stages_add_up_to_the_model(layer_bytes, gpus, before, after):
    found = shares(layer_bytes, gpus, before, after)
    assert sum(share.weights_bytes for share in found) == sum(layer_bytes) + before + after
    assert sum(share.cache_layers.total() for share in found) == len(layer_bytes)
    assert sum(share.part for share in found) == pytest.approx(1)
    assert len(found) <= gpus


def test_the_largest_stage_is_as_small_as_whole_layers_allow():
    found = shares([10] * 8, 3, before=20, after=5)
    assert [share.weights_bytes for share in found] == [40, 40, 25]
    assert max(share.weights_bytes for share in shares([7, 1, 1, 1, 7], 2)) == 9


def test_tensor_parallelism_cuts_heads_until_one_is_left_and_no_latent():
    layers = Counter({GQA: 4, LatentCache(512, 64): 2, RecurrentState(30, 64): 1})
    share = tensor_share(1000, 900, layers, 16)
    assert share.weights_bytes == 100 + 57
    assert share.cache_layers == Counter(
        {AttentionCache(1, 128, 128): 4, LatentCache(512, 64): 2, RecurrentState(2, 4): 1}
    )


@pytest.mark.parametrize("split", ["pipeline", "tensor"])
def test_more_gpus_take_less_each_and_more_together(split):
    model = reference_models()[2].describe()
    plans = [plan_of(model, "bf16", gpus=gpus, split=split) for gpus in (1, 2, 4, 8)]
    weights = [plan.components["weights"].bytes for plan in plans]
    cache = [plan.components["kv_cache"].bytes for plan in plans]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 4
    assert cache == sorted(cache, reverse=True)
    for gpus, num_bytes in zip((1, 2, 4, 8), weights, strict=True):
        assert gpus * num_bytes >= weights[0]
    assert plans[0].checkpoint_bytes == plans[3].checkpoint_bytes


def test_gpus_that_talk_to_each_other_hold_its_buffers():
    model = reference_models()[0].describe()

    def overhead(num_gpus, split):
        return plan_of(model, "bf16", gpus=num_gpus, split=split).components["runtime_overhead"]

    alone, two, four = (overhead(num_gpus, "tensor").bytes for num_gpus in (1, 2, 4))
    assert (two - alone, four - alone) == (342_000_000, 392_000_000)
    assert overhead(4, "pipeline").bytes == alone


def test_tensor_parallelism_keeps_hidden_states_whole_and_cuts_the_rest():
    model = reference_models()[2].describe()
    asked = {"runtime": "transformers", "split": "tensor"}
    parts = [plan_of(model, "nf4", gpus=gpus, **asked).components for gpus in (1, 2, 8)]
    activations = [part["activations"].bytes for part in parts]
    assert activations == sorted(activations, reverse=True)
    hidden_states = 4 * 4096 * 4096 * 2
    assert activations[2] > hidden_states and activations[0] < 8 * activations[2]
    sequential = plan_of(model, "nf4", runtime="transformers", gpus=2).components["activations"]
    assert sequential.bytes == activations[0]
