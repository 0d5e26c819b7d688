"""The chunked loss equals transformers' own, and so do its gradients."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from qtool.finetune import loss as module
from qtool.finetune.loss import LogitRule, chunked_causal_loss
from qtool.planner import training_loss
from tests.runtime.packed_layers import relative_error

WIDTH, VOCABULARY = 24, 51


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 13, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, 13), generator=generator)
    labels[0, :5] = labels[1, 12] = -100
    return hidden, weight, labels


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, rule: LogitRule | None = None, **settings: Any
) -> list[Tensor]:
    wide, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = wide @ wide_weight.T
    if rule is not None:
        logits = logits * rule.scale
    if rule is not None and rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    # It turns logits into float32, which is what the tolerance allows for.
    value = ForCausalLMLoss(logits, labels, VOCABULARY, **settings)
    value.backward()
    return [value.detach(), wide.grad, wide_weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(7)])
def test_equals_the_loss_of_transformers(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, items: Any
) -> None:
    monkeypatch.setattr(training_loss, "CHUNK_BYTES", 4 * VOCABULARY * chunk_tokens)
    hidden, weight, labels = make_inputs()
    expected = reference(hidden, weight, labels, num_items_in_batch=items)
    found = chunked_causal_loss(hidden, weight, labels, num_items_in_batch=items)
    assert found.dtype == torch.float32
    found.backward()
    for one, other in zip([found.detach(), hidden.grad, weight.grad], expected, strict=True):
        assert relative_error(one, other) < 2e-6


@pytest.mark.parametrize("rule", [LogitRule(0.3), LogitRule(softcap=5.0), LogitRule(1.5, 4.0)])
def test_scales_and_soft_caps(rule: LogitRule) -> None:
    hidden, weight, labels = make_inputs()
    expected = reference(hidden, weight, labels, rule)
    found = chunked_causal_loss(hidden, weight, labels, rule=rule)
    found.backward()
    for one, other in zip([found.detach(), hidden.grad, weight.grad], expected, strict=True):
        assert relative_error(one, other) < 2e-6


@pytest.mark.parametrize("is_autocast", [True, False])
def test_in_16_bit(is_autocast: bool) -> None:
    hidden, weight, labels = make_inputs(torch.float32 if is_autocast else torch.bfloat16)
    expected = reference(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = chunked_causal_loss(hidden, weight, labels)
    found.backward()
    assert hidden.grad.dtype == hidden.dtype
    for one, other in zip([found.detach(), hidden.grad, weight.grad], expected, strict=True):
        assert relative_error(one, other) < 1e-2


def test_scaling_and_accumulation() -> None:
    hidden, weight, labels = make_inputs()
    (1024 * chunked_causal_loss(hidden, weight, labels)).backward()
    scaled = hidden.grad.clone()
    hidden.grad = None
    chunked_causal_loss(hidden, weight, labels).backward()
    assert relative_error(scaled, 1024 * hidden.grad) < 1e-6


def test_float16_keeps_gradients_that_are_scaled_up_in_the_end() -> None:
    """As many labels as make each one's gradient less than the smallest float16."""
    hidden, weight, labels = make_inputs(torch.float16)
    expected = reference(hidden, weight, labels)
    scale, items = 2.0**16, 10_000_000
    loss = chunked_causal_loss(hidden, weight, labels, num_items_in_batch=items)
    (scale * loss).backward()
    learned = (labels[:, 1:] != -100).sum()
    assert relative_error(hidden.grad, expected[1] * scale * learned / items) < 1e-2


def test_there_is_one_backward_pass() -> None:
    hidden, weight, labels = make_inputs()
    loss = chunked_causal_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_bias_is_trained() -> None:
    hidden, weight, labels = make_inputs()
    bias = torch.randn(VOCABULARY, requires_grad=True)
    chunked_causal_loss(hidden, weight, labels, head_bias=bias).backward()
    found, bias.grad = bias.grad, None
    ForCausalLMLoss(hidden.detach() @ weight.T + bias, labels, VOCABULARY).backward()
    assert found is not None
    assert relative_error(found, bias.grad) < 2e-6


def test_a_frozen_head_gets_no_gradient_and_its_bias_counts() -> None:
    hidden, weight, labels = make_inputs()
    weight.requires_grad_(False)
    bias = torch.randn(VOCABULARY)
    found = chunked_causal_loss(hidden, weight, labels, head_bias=bias)
    found.backward()
    logits = (hidden @ weight.T + bias).detach()
    assert relative_error(found.detach(), ForCausalLMLoss(logits, labels, VOCABULARY)) < 1e-6
    assert weight.grad is None
    assert hidden.grad is not None


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make_inputs()
    monkeypatch.setattr(module.torch, "empty_like", None)
    monkeypatch.setattr(module.torch, "zeros_like", None)
    with torch.no_grad():
        found = chunked_causal_loss(hidden, weight, labels)
    assert not found.requires_grad
    assert relative_error(found, reference(hidden, weight, labels)[0]) < 1e-6


def test_nothing_to_learn_is_not_a_number_as_it_is_elsewhere() -> None:
    hidden, weight, labels = make_inputs()
    labels.fill_(-100)
    assert chunked_causal_loss(hidden, weight, labels).isnan()
    assert chunked_causal_loss(hidden, weight, labels, num_items_in_batch=3) == 0


def test_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loss, "CHUNK_BYTES", 4 * VOCABULARY * 4)
    hidden, weight, labels = make_inputs()
    weight.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_causal_loss(hidden, weight, labels)
    assert [tensor.shape for tensor in kept] == [(26, WIDTH), ()]
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape[-1:] == (VOCABULARY,)]
    assert not alive
