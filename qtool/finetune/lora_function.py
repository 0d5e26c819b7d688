"""A packed linear layer and its LoRA adapter as one step of autograd.

    y = x W^T + bias + s * drop(x) A^T B^T

PEFT's chain of modules casts, scales and adds in passes of their own over activations as wide as
the layer. Here matrix products add to what is there, the adapter's first on a GPU; forward and
backward pass dequantize W for as long as a product takes. Kept for the backward pass: x once, in
the dtype that is multiplied, dropout's mask in a byte per element, and what is `r` wide.

Sums are those of the matrix products, float32 for 16-bit operands. The adapter's product and the
gradient of x are rounded once before W's part is added to them in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtool.finetune.loss import without_autocast
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.products import runs_fused

COMPUTE_DTYPES: Final = frozenset({torch.bfloat16, torch.float16, torch.float32})
_CAST: Final = "_qtool_cast"  # on an activation: its version, and what it was cast to


def lora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    base: Linear4bit | LinearInt8,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """The layer's output with one adapter added; gradients reach `x`, `a` and `b`.

    Dropout draws its mask from PyTorch's generator of the device in the forward pass, once: so
    checkpointing, which sets the generator back, makes the same mask again. There is no second
    derivative.

    Args:
        x: bfloat16, float16 or float32 (..., in), on one device with all the rest.
        a: floating point (r, in); its gradient is in its own dtype.
        b: floating point (out, r), likewise.
        base: the packed layer; a bias of it is taken for frozen.
        scaling: s.
        dropout: how many of x's elements the adapter does not see, at least 0 and less than 1.

    Returns:
        (..., out) in the dtype that `base` itself answers in: autocast's, or that of x.
    """
    function: Any = _LoraLinear  # PyTorch declares no types for its methods
    made: Tensor = function.apply(x, a, b, base, scaling, dropout)
    return made


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        base: Linear4bit | LinearInt8,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        dtype, returned = base.product_dtypes(x)
        with without_autocast(x.device.type):
            read = _cast_once(x, dtype)
            rows = read.reshape(-1, base.in_features)  # (tokens, in)
            narrow_a, scaled_b = a.to(dtype), _scale(b, scaling, dtype)
            dropped, mask = rows, None
            if dropout:
                dropped, mask = torch.native_dropout(rows, dropout, True)
            narrow = dropped @ narrow_a.t()  # (tokens, r)
            del dropped
            out = _add_up(base, rows, narrow, scaled_b)
        ctx.save_for_backward(read, mask, narrow, narrow_a, scaled_b)
        # Packed bytes are no saved tensors: hooks that move those elsewhere would move them too.
        ctx.base, ctx.version = base, base.weight._version
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.dtypes = x.dtype, a.dtype, b.dtype
        return out.view(*x.shape[:-1], base.out_features).to(returned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, mask, narrow, narrow_a, scaled_b = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        if ctx.version != ctx.base.weight._version:
            raise RuntimeError("the packed weight was changed between forward and backward pass")
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        to_x = to_a = to_b = None
        with without_autocast(read.device.type):
            gradient = gradient.reshape(-1, gradient.shape[-1]).to(read.dtype)
            to_narrow = gradient @ scaled_b  # (tokens, r)
            if needs_b:
                to_b = _sum_over_tokens(gradient, narrow, b_dtype).mul_(ctx.scaling)
            if needs_a:
                rows = read.reshape(-1, read.shape[-1])
                dropped = rows if mask is None else _drop(rows, mask, ctx.dropout)
                to_a = _sum_over_tokens(to_narrow, dropped, a_dtype)
                del dropped
            if needs_x:
                to_x = to_narrow @ narrow_a
                if mask is not None:
                    to_x = _drop(to_x, mask, ctx.dropout)
                ctx.base.add_input_gradient(gradient, to_x)
                to_x = to_x.view(read.shape).to(x_dtype)
        return to_x, to_a, to_b, None, None, None


def _add_up(
    base: Linear4bit | LinearInt8, rows: Tensor, narrow: Tensor, scaled_b: Tensor
) -> Tensor:
    """(tokens, out): the product with the packed weight, its bias, and narrow @ scaled_b.T."""
    bias = base.bias_in(rows.dtype)
    rounds = isinstance(base, LinearInt8) and base.threshold is not None
    if rounds or not rows.is_cuda or runs_fused(rows, base.in_features):
        out = base.multiply(rows, bias)
        return out.addmm_(narrow, scaled_b.t())
    # This way round, the wide product reads the narrow one's sums while it computes.
    if bias is None:
        out = narrow @ scaled_b.t()
    else:
        out = torch.addmm(bias, narrow, scaled_b.t())
    base.add_product(rows, out)
    return out


def _cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; layers that read the same tensor share the copy, which goes when x goes."""
    if x.dtype == dtype:
        return x
    kept = getattr(x, _CAST, None)
    if kept is not None and kept[0] == x._version and kept[1].dtype == dtype:
        return cast(Tensor, kept[1])
    made = x.detach().to(dtype)
    if not x.is_inference():  # those have no version
        setattr(x, _CAST, (x._version, made))
    return made


def _scale(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling * b, rounded once to `dtype`."""
    return torch.mul(b, scaling, out=torch.empty_like(b, dtype=dtype))


def _drop(values: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """What dropout with this mask makes of `values`, as it did in the forward pass."""
    return cast(Tensor, torch.ops.aten.native_dropout_backward(values, mask, 1.0 / (1.0 - dropout)))


def _sum_over_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left.T @ right in `dtype`: (tokens, m), (tokens, n) -> (m, n), summed in float32."""
    if left.dtype == dtype:
        return left.t() @ right
    if left.is_cuda and dtype == torch.float32 and _has_wide_results():
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    if left.is_cuda:
        return (left.t() @ right).to(dtype)
    return (left.t().float() @ right.float()).to(dtype)


@cache
def _has_wide_results() -> bool:
    """Whether this PyTorch multiplies 16-bit matrices into float32 on a GPU."""
    multiply: Any = torch.ops.aten.mm
    return "dtype" in multiply.overloads()
