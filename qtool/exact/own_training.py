"""What `qtool finetune` runs, where it would do otherwise on the meta device than on a GPU.

The layers' step of autograd and the loss are the ones that train. Replaced is what asks for the
device: products with packed weights, the dtypes of autocast, float32 sums of 16-bit products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.exact.optimizers import new_states
from qtool.exact.own_runtime import reads_packed, replaced
from qtool.finetune import loss
from qtool.finetune.head_loss import set_chunked_loss
from qtool.finetune.loss import LogitRule
from qtool.runtime import linear, products


def prepare_loss(network: Any) -> None:
    """Have the model compute its loss without logits, as training does."""
    config = network.config.get_text_config()
    set_chunked_loss(network, LogitRule(softcap=getattr(config, "final_logit_softcapping", None)))


class OwnOptimizer(torch.optim.Optimizer):
    """AdamW as `qtool finetune` has it: PyTorch's in one kernel, or 8-bit states that leave out
    embeddings. Both allocate states and nothing else."""

    def __init__(self, parameters: Sequence[Tensor], network: nn.Module, *, is_8bit: bool) -> None:
        super().__init__(parameters, {})
        embeddings = (m for m in network.modules() if isinstance(m, nn.Embedding))
        self._is_8bit = is_8bit
        self._embeddings = {m.weight for m in embeddings}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make the states of parameters that have a gradient for the first time."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None or self.state[parameter]:
                continue
            if self._is_8bit and parameter not in self._embeddings:
                self.state[parameter] = new_states(parameter)
                continue
            dtype = torch.float32 if self._is_8bit else parameter.dtype
            for name in ("state1", "state2"):
                self.state[parameter][name] = torch.zeros_like(parameter, dtype=dtype)


@contextmanager
def training_of_a_gpu(autocast_dtype: torch.dtype) -> Iterator[None]:
    """Layers that allocate what they do on a GPU, under autocast to `autocast_dtype`."""
    replacements: list[tuple[Any, str, Any]] = [
        (linear.Linear4bit, "multiply", _multiply),
        (linear.LinearInt8, "multiply", _multiply),
        (linear._PackedLinear, "_float_pieces", _float_pieces),
        (
            linear._PackedLinear,
            "product_dtypes",
            lambda layer, x: (autocast_dtype, autocast_dtype),
        ),
        (loss, "_product_dtype", lambda hidden: autocast_dtype),
    ]
    try:
        from qtool.finetune import lora_function
    except ImportError:  # without PEFT all weights are trained
        pass
    else:
        replacements.append((lora_function, "_sum_over_tokens", _sum_over_tokens))
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(replaced(*replacement))
        yield


def _multiply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    product: Any = _PackedProduct  # PyTorch declares no types for its methods
    made: Tensor = product.apply(x, layer, bias)
    return made


class _PackedProduct(torch.autograd.Function):
    """The operators of `qtool.runtime.products`, which keep nothing of their input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        if reads_packed(x):
            return x.new_empty(*x.shape[:-1], layer.out_features)

        def make_weight(rows: slice) -> Tensor:
            return _float_rows(layer, rows, x.dtype)

        return products._multiply_in_pieces(x, make_weight, layer.out_features, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def make_weight(rows: slice) -> Tensor:
            return _float_rows(ctx.layer, rows, gradient.dtype)

        columns = ctx.layer.in_features
        return products._multiply_gradient(gradient, make_weight, columns), None, None


def _float_pieces(layer: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for rows in products.row_pieces(layer.out_features, layer.in_features):
        yield rows, _float_rows(layer, rows, dtype)


def _float_rows(layer: Any, rows: slice, dtype: torch.dtype) -> Tensor:
    shape = rows.stop - rows.start, layer.in_features
    return torch.empty(*shape, dtype=dtype, device=layer.weight.device)


def _sum_over_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(left.shape[1], right.shape[1], dtype=dtype, device=left.device)


__all__ = ["OwnOptimizer", "prepare_loss", "training_of_a_gpu"]
