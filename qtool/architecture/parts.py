"""The vocabulary that architectures are written in: a layer's name and sizes -> its parameters.

Each word returns the parameters in the order in which the module registers them, so that a model
spelled with them lists its tensors in the model's own order.
"""

from __future__ import annotations

from qtool.architecture.records import ModelTensor

Tensors = tuple[ModelTensor, ...]


def linear(
    name: str, outputs: int, inputs: int, *, bias: bool = False, replaceable: bool = True
) -> Tensors:
    """nn.Linear: weight [outputs, inputs]."""
    weight = ModelTensor(f"{name}.weight", (outputs, inputs), "linear", replaceable=replaceable)
    return (weight, ModelTensor(f"{name}.bias", (outputs,), "bias")) if bias else (weight,)


def conv1d(name: str, outputs: int, inputs: int) -> Tensors:
    """transformers' Conv1D: a linear layer that stores its weight as [inputs, outputs]."""
    return (
        ModelTensor(f"{name}.weight", (inputs, outputs), "conv1d"),
        ModelTensor(f"{name}.bias", (outputs,), "bias"),
    )


def experts(
    name: str,
    num_experts: int,
    outputs: int,
    inputs: int,
    *,
    per_token: int,
    transposed: bool = False,
    bias: bool = False,
) -> Tensors:
    """One linear layer of all routed experts: `name` [experts, outputs, inputs], or the last two
    `transposed`, and `name`_bias [experts, outputs]. One token uses `per_token` of them."""
    weight = ModelTensor(
        name,
        (num_experts, inputs, outputs) if transposed else (num_experts, outputs, inputs),
        "experts_transposed" if transposed else "experts",
        experts_per_token=per_token,
    )
    biases = ModelTensor(
        f"{name}_bias", (num_experts, outputs), "bias", experts_per_token=per_token
    )
    return (weight, biases) if bias else (weight,)


def embedding(name: str, rows: int, width: int) -> Tensors:
    """nn.Embedding: weight [rows, width]."""
    return (ModelTensor(f"{name}.weight", (rows, width), "embedding"),)


def norm(name: str, width: int, *, bias: bool = False) -> Tensors:
    """RMSNorm, or LayerNorm with its bias."""
    weight = ModelTensor(f"{name}.weight", (width,), "norm")
    return (weight, ModelTensor(f"{name}.bias", (width,), "bias")) if bias else (weight,)


def parameter(name: str, *shape: int) -> Tensors:
    """Any other parameter: a convolution kernel, a scale, a decay."""
    return (ModelTensor(name, shape, "other"),)


def convolution(name: str, *shape: int, bias: bool = True) -> Tensors:
    """A convolution of any rank: weight [out channels, in channels per group, kernel...]."""
    weight = parameter(f"{name}.weight", *shape)
    return (*weight, ModelTensor(f"{name}.bias", (shape[0],), "bias")) if bias else weight
