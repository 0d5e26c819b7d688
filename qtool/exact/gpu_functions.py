"""What a GPU does where the meta device has nothing: fused attention, dropout, autocast.

A function mode, so that it stands above autograd: the casts that autocast makes are recorded, and
so are the masks that dropout keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from qtool.exact.attention import fused_attention, is_fused

# Functions by name, so that `torch.matmul`, `Tensor.matmul` and `@` are one. The lists are those
# of autocast on CUDA (aten/src/ATen/autocast_mode.h) as far as language models call them.
LOWERED: Final = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm"}
    | {"einsum", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}
)
RAISED: Final = frozenset(
    {"exp", "expm1", "log", "log1p", "log2", "log10", "pow", "__pow__", "rsqrt", "reciprocal"}
    | {"softplus", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "mse_loss", "norm"}
    | {"softmax", "log_softmax", "cumsum", "cumprod", "sum", "prod"}
)


class GpuFunctions(TorchFunctionMode):
    """Replaces the functions whose GPU version allocates otherwise.

    Args:
        autocast_dtype: what matrix products are lowered to; None without autocast.
    """

    def __init__(self, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._autocast_dtype = autocast_dtype
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._autocast_dtype is not None:
            args, kwargs = self._autocast(name, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.histc:  # counts in the bins of its dtype, which the meta device refuses
            return args[0].new_empty(kwargs["bins"])
        return func(*args, **kwargs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a model runs forward: trainable weights are cast once, as autocast keeps them."""
        with self:
            self._cast_weights = {}
            try:
                yield
            finally:
                self._cast_weights = {}

    def _autocast(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cast: Callable[[Any], Any]
        if name in LOWERED:
            cast = self._lowered
        elif name in RAISED and "dtype" not in kwargs:
            cast = _raised
        else:
            return args, kwargs
        return tree_map(cast, args), tree_map(cast, kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            return value
        if value.dtype == self._autocast_dtype:
            return value
        is_kept = value.is_leaf and value.requires_grad and value.dtype == torch.float32
        if not is_kept:
            return value.to(self._autocast_dtype)
        if id(value) not in self._cast_weights:
            self._cast_weights[id(value)] = value.to(self._autocast_dtype)
        return self._cast_weights[id(value)]


def _raised(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_fused(query, enable_gqa=enable_gqa):
        return fused_attention(query, key, value, attn_mask)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel that keeps a boolean mask; nothing at all where nothing is dropped."""
    if not training or p == 0:
        return input
    output: Tensor = torch.native_dropout(input, p, True)[0]
    return output
