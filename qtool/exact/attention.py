"""What PyTorch's fused attention kernels allocate on a GPU, forward and backward."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

HALF_DTYPES: Final = (torch.float16, torch.bfloat16)
# The memory-efficient kernel, the one that takes a mask, wants rows of it aligned to so many bytes.
MASK_ALIGNMENT_BYTES: Final = 16


def is_fused(query: Tensor, *, enable_gqa: bool) -> bool:
    """Whether some fused kernel takes these heads; grouped ones only the 16-bit kernel does."""
    return query.dtype in HALF_DTYPES or not enable_gqa


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The output of attention, with what the kernel holds meanwhile.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv_heads, kv_tokens, head_dim).
        value: (batch, kv_heads, kv_tokens, value_head_dim).
        mask: boolean or of the query's dtype, broadcast to (batch, heads, tokens, kv_tokens).
    """
    if mask is not None:
        mask = _additive_mask(mask, query.dtype)
    output: Tensor = _FusedAttention.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
    return output


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask becomes one of numbers, and one with ragged rows is copied to padded rows."""
    if mask.dtype == torch.bool:
        mask = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    ragged = -mask.shape[-1] % (MASK_ALIGNMENT_BYTES // mask.element_size())
    return torch.nn.functional.pad(mask, (0, ragged)) if ragged else mask


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, the output and one float32 per query for backward.

    Backward adds up the query's gradient in float32, and makes the gradients of keys and values
    for every query head before it sums those of a group.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        row_sums = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
        shape = (batch, tokens, heads, value.shape[-1])
        output = torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, row_sums, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, row_sums, _ = ctx.saved_tensors
        sums = torch.empty_like(row_sums), torch.empty_like(query, dtype=torch.float32)
        made = [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)]
        if key.shape[1] != query.shape[1]:
            expanded = [
                part.new_empty(part.shape[0], query.shape[1], *part.shape[2:])
                for part in (key, value)
            ]
            del expanded
        del sums
        return (*made, None)
