"""The output head of a bfloat16 model in host memory, which each token reads from end to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtool.runtime.products_host import linear_bfloat16_host


class HostLinear(nn.Linear):
    """`plain` with our product for a few tokens, over the same parameters: ties stay.

    With gradients, on another device or under torch.compile it multiplies as `plain` does.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = plain.weight
        self.register_parameter("bias", plain.bias)
        self.train(plain.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the input's dtype."""
        here = input.device.type == self.weight.device.type == "cpu"
        if not here or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        return linear_bfloat16_host(input, self.weight, bias=self.bias)


def multiply_head_on_host(model: Any) -> None:
    """Give a transformers model such a head where its own is a plain layer in bfloat16 in host
    memory, that accelerate does not move about; change nothing else."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return
    if head.weight.device.type == "cpu" and head.weight.dtype == torch.bfloat16:
        model.set_output_embeddings(HostLinear(head))
