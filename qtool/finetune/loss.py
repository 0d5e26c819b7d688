"""The loss of a language model without its logits: a chunk of tokens at a time.

    loss = chunked_causal_loss(hidden, head.weight, labels)

Logits of 4,096 tokens and 128,256 words are 2 GiB in float32, their softmax and gradient as much
again: the peak of a training step. Here the forward pass makes the logits of some tokens, their
loss and at once the gradient of the hidden states, and keeps that alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional

from qtool.finetune.sequences import IGNORED_LABEL
from qtool.planner.training_loss import chunk_tokens


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model makes of its head's products: softcap * tanh(scale * product / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN: Final = LogitRule()


def apply_rule(logits: Tensor, rule: LogitRule, *, wanted: bool) -> Tensor | float | None:
    """Make logits of products, in place; returns what their gradient is multiplied by, if wanted.

    Args:
        logits: float32 (tokens, words).
    """
    if rule.softcap is None:
        if rule.scale == 1:
            return None
        logits.mul_(rule.scale)
        return rule.scale
    logits.mul_(rule.scale / rule.softcap).tanh_()
    slope = logits.square().sub_(1).mul_(-rule.scale) if wanted else None
    logits.mul_(rule.softcap)
    return slope


def chunked_causal_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED_LABEL,
    head_bias: Tensor | None = None,
    rule: LogitRule = PLAIN,
) -> Tensor:
    """Cross entropy of each token's successor, as transformers' ForCausalLMLoss has it.

    There is one backward pass: it uses up what was kept for it.

    Args:
        hidden: bfloat16, float16 or float32 (batch, tokens, width), the last hidden states.
        head_weight: floating point (vocabulary, width); it gets a gradient if it needs one.
        labels: int64 (batch, tokens), the input ids; `ignore_index` where nothing is learned.
        num_items_in_batch: what the sum is divided by, for gradient accumulation; None takes the
            number of labels that count.
        head_bias: (vocabulary,), likewise.
        rule: what the products with the head go through.

    Returns:
        float32 (). Products are in autocast's dtype, or that of `hidden`; the rest is in float32.
    """
    targets = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
    targets = targets.to(hidden.device)
    if num_items_in_batch is None:
        divisor: Tensor = (targets != ignore_index).sum()
    else:
        divisor = torch.as_tensor(num_items_in_batch, device=hidden.device)
    function: Any = _ChunkedLoss  # PyTorch declares no types for its methods
    # Inside of `apply` nobody can tell whether gradients are wanted.
    parts = (hidden, head_weight, head_bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in parts]
    loss: Tensor = function.apply(*parts, targets, divisor, ignore_index, rule, needs)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """See `chunked_causal_loss`; its backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor,
        ignore_index: int,
        rule: LogitRule,
        needs: list[bool],
    ) -> Tensor:
        dtype = _product_dtype(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        to_hidden = torch.empty_like(rows, dtype=dtype) if needs[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        to_bias = torch.zeros_like(cast(Tensor, bias), dtype=torch.float32) if needs[2] else None
        narrow = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # float16 would lose gradients that are divided before the scaler has made them larger.
        one = torch.ones_like(divisor)
        now, later = (one, divisor) if dtype == torch.float16 else (divisor, one)
        with without_autocast(hidden.device.type):
            for chunk in _chunks(rows.shape[0], weight.shape[0]):
                read = rows[chunk].to(dtype)
                logits = functional.linear(read, narrow, offset).float()
                losses, gradient = _loss_and_gradient(
                    logits, targets[chunk], ignore_index, rule, now if any(needs) else None
                )
                del logits
                total += losses
                short = gradient.to(dtype)
                if to_bias is not None:
                    to_bias += gradient.sum(0)
                del gradient  # it is the logits' memory
                if to_hidden is not None:
                    torch.mm(short, narrow, out=to_hidden[chunk])
                if to_weight is not None:
                    _add_product(to_weight, short.t(), read)
                del short
        ctx.save_for_backward(to_hidden, to_weight, to_bias, later)
        ctx.shape = hidden.shape
        ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
        return total / divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *made, later = ctx.saved_tensors
        share = gradient / later
        scaled = [
            None if part is None else part.mul_(share).to(dtype)
            for part, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        if scaled[0] is not None:
            scaled[0] = scaled[0].view(ctx.shape)
        return *scaled, None, None, None, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Dtypes are settled; and a backward pass may run under the caller's autocast or not."""
    return torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right in float32, whose parts are not rounded to 16 bit before."""
    if left.is_cuda and left.dtype != torch.float32 and _has_wide_results():
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.float(), right.float())


@cache
def _has_wide_results() -> bool:
    """Whether this PyTorch adds products of 16-bit matrices to float32 on a GPU."""
    multiply: Any = torch.ops.aten.addmm
    return "dtype_out" in multiply.overloads()


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    step = chunk_tokens(vocabulary)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, ignore_index: int, rule: LogitRule, divisor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and in the memory of `logits` float32 (tokens, words) its gradient
    over `divisor`; without one anything."""
    counts = targets != ignore_index
    index = targets.where(counts, 0)[:, None]  # any word where nothing is learned
    slope = apply_rule(logits, rule, wanted=divisor is not None)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    chosen = logits.gather(1, index)
    gradient = logits.exp_()
    sums = gradient.sum(dim=-1, keepdim=True)
    losses = (sums.log() - chosen).squeeze(1).where(counts, 0.0).sum()
    if divisor is None:
        return losses, gradient
    learned = counts[:, None].to(gradient.dtype) / divisor
    gradient.mul_(learned / sums)
    gradient.scatter_add_(1, index, -learned)
    if slope is not None:
        gradient.mul_(slope)
    return losses, gradient
