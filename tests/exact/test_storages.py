"""Storages count from the operator that makes them until the last tensor over them is gone."""

from __future__ import annotations

import torch

from qtool.exact.storages import LiveStorages

KIB = 1024


def floats(num_bytes, **options):
    return torch.empty(num_bytes // 4, device="meta", **options)


def test_the_peak_is_what_lives_at_once():
    with torch.no_grad(), LiveStorages() as storages:
        first = floats(8 * KIB)
        second = first + 1
        del first
        third = second + 1
        del second, third
        floats(4 * KIB)
    assert storages.peak_bytes == 16 * KIB


def test_views_and_in_place_operators_take_nothing():
    with torch.no_grad(), LiveStorages() as storages:
        tensor = floats(8 * KIB)
        view = tensor.view(2, -1).t()
        view.mul_(2).add_(1)
        del tensor
        view.zero_()
    assert storages.peak_bytes == 8 * KIB


def test_the_softmax_of_attention_makes_a_boolean_of_each_score():
    with torch.no_grad(), LiveStorages() as storages:
        scores = floats(8 * KIB)
        torch.ops.aten._safe_softmax(scores, -1)
    assert storages.peak_bytes == (8 + 8 + 2) * KIB


def test_requests_are_rounded_up_to_512_bytes():
    with LiveStorages() as storages:
        kept = [torch.empty(1, device="meta"), torch.empty(129, device="meta")]
    assert len(kept) == 2
    assert storages.peak_bytes == 512 + 1024


def test_saved_activations_live_until_backward():
    parameter = floats(8 * KIB, requires_grad=True)
    with LiveStorages() as storages:
        kept_bytes = storages.add([parameter], "weights")
        total = (parameter.exp() * 2).sum()
        total.backward()
    assert kept_bytes == 8 * KIB
    # exp is saved; then its product, or the gradients of both.
    assert storages.peak_bytes == (8 + 8 + 8 + 8) * KIB + 1024


def test_the_parts_of_the_peak_add_up_and_keep_their_names():
    weight = floats(8 * KIB)
    storages = LiveStorages(lambda operator, tensor: "activations", lambda: "here")
    storages.add([weight], "weights")
    with torch.no_grad(), storages:
        gradient = weight * 2
        storages.mark([gradient], "gradients")
        late = gradient[:256] * 2
        del gradient, late
        floats(KIB)
    assert storages.at_peak() == {"weights": 8 * KIB, "gradients": 8 * KIB, "activations": KIB}
    assert sum(storages.at_peak().values()) == storages.peak_bytes
    assert storages.peak_place == "here mul"


def test_remembered_shapes_are_those_of_the_operator():
    """The second call is answered from memory; other arguments are not."""
    with torch.no_grad(), LiveStorages():
        ints = torch.ones(4, 6, dtype=torch.int32, device="meta")
        for factor, dtype in ((2, torch.int32), (2.0, torch.float32)):
            for _ in range(2):
                assert (ints * factor).dtype == dtype
        for _ in range(2):
            assert (ints.t() + 1).stride() == (1, 6)
            values, indices = torch.topk(ints, 2)
            assert (values.shape, indices.dtype) == ((4, 2), torch.int64)


def test_questions_about_values_are_answered_with_yes():
    with LiveStorages():
        mask = torch.ones(3, device="meta")
        assert bool((mask == 1).all())


def test_an_operator_that_hides_its_alias_takes_nothing_either():
    with torch.no_grad(), LiveStorages() as storages:
        tensor = floats(8 * KIB)
        for _ in range(2):
            view = torch.ops.aten._unsafe_view(tensor, [2, -1])
            assert view.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert storages.peak_bytes == 8 * KIB
