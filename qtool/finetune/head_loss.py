"""A model whose forward pass gives the loss without the logits.

    if use_chunked_loss(model):
        loss = model(input_ids=ids, labels=ids).loss

What a model makes of its head's products (a scale, a soft cap) is not looked up by its type: it is
asked, with hidden states drawn at random in place of its layers' own. One that answers otherwise
than by the rules known here keeps its own loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from types import MethodType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from qtool.finetune.loss import (
    PLAIN,
    LogitRule,
    apply_rule,
    chunked_causal_loss,
)
from qtool.finetune.sequences import IGNORED_LABEL
from qtool.runtime.host_head import HostLinear

# Names that configs have for what logits are multiplied by; some divide by it.
SCALES: Final = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
ASKED_TOKENS: Final = 8
LOUDEST: Final = 30.0  # of the logits asked about, so that a cap shows
TOLERANCE: Final = 0.02  # relative; a scale and a cap in bfloat16 round a few times


def use_chunked_loss(model: Any) -> bool:
    """Whether `model`, a causal language model or PEFT's wrapper of one, gives it from now on.

    Without labels it does what it did.
    """
    network = model.get_base_model() if hasattr(model, "peft_config") else model
    rule = find_rule(network)
    if rule is not None:
        set_chunked_loss(network, rule)
    return rule is not None


def set_chunked_loss(network: Any, rule: LogitRule = PLAIN) -> None:
    """Replace the forward pass of a transformers model, whose logits follow `rule`."""
    before = network.forward

    @wraps(type(network).forward)  # what the Trainer passes is read from the signature
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or kwargs.get("shift_labels") is not None:
            return before(*args, **kwargs | ({} if labels is None else {"labels": labels}))
        num_items = kwargs.pop("num_items_in_batch", None)
        if num_items is None:  # none at all is a loss of zero, as TRL has it
            num_items = (labels[..., 1:] != IGNORED_LABEL).sum().clamp(min=1)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        loss = chunked_causal_loss(
            hidden,
            head.weight,
            labels,
            num_items_in_batch=num_items,
            head_bias=head.bias,
            rule=rule,
        )
        return CausalLMOutputWithPast(loss=loss)

    network.forward = MethodType(forward, network)


def find_rule(network: Any) -> LogitRule | None:
    """The rule that the model's logits follow; None where there is none or its loss has more."""
    config, head = network.config.get_text_config(), network.get_output_embeddings()
    # Adapted, packed or offloaded heads are more than their weight.
    is_plain = type(head) in (nn.Linear, HostLinear) and not hasattr(head, "_hf_hook")
    adds_routers = hasattr(config, "output_router_logits") and config.router_aux_loss_coef
    if not is_plain or adds_routers or network.base_model is network:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, ASKED_TOKENS, head.in_features, generator=generator).to(head.weight)
    labels = torch.randint(0, head.out_features, hidden.shape[:2], generator=generator)
    labels = labels.to(head.weight.device)
    with torch.no_grad():
        hidden *= LOUDEST / functional.linear(hidden, head.weight).abs().max()
        try:
            answer = _ask(network, hidden, labels)
            logits, loss = answer.logits.float(), answer.loss
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # its forward pass wants more of its layers than hidden states
        for rule in _known_rules(config):
            products = functional.linear(hidden, head.weight, head.bias).float()
            apply_rule(products, rule, wanted=False)
            if products.shape == logits.shape and _differ(products, logits) < TOLERANCE:
                ours = chunked_causal_loss(
                    hidden, head.weight, labels, head_bias=head.bias, rule=rule
                )
                return rule if _differ(ours, loss) < TOLERANCE else None
    return None


def _known_rules(config: Any) -> Iterator[LogitRule]:
    cap = cast(float | None, getattr(config, "final_logit_softcapping", None))
    yield LogitRule(softcap=cap)
    for name in SCALES:
        scale = getattr(config, name, None)
        if scale:
            yield LogitRule(float(scale), cap)
            yield LogitRule(1 / float(scale), cap)


def _ask(network: Any, hidden: Tensor, labels: Tensor) -> Any:
    """What the model answers when its layers put out `hidden`."""
    layers = network.base_model
    replaced = layers.__dict__.get("forward")
    states = MoeModelOutputWithPast(last_hidden_state=hidden)
    states.cross_attentions = None  # some hand it on
    layers.forward = lambda *args, **kwargs: states
    try:
        return network(input_ids=labels, labels=labels, use_cache=False)
    finally:
        del layers.forward
        if replaced is not None:
            layers.forward = replaced


def _differ(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
