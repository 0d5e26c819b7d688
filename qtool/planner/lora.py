"""Which linear layers LoRA adapts, and the parameters it adds: r * (in + out) for each.

The rules are PEFT's (tuners/tuners_utils.py): "all-linear" is every linear layer but the output
head, a name matches a module that has it or ends in "." and it. Layers whose adapters would never
be trained are no part of "all-linear" here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qtool.architecture import Architecture, ModelTensor
from qtool.errors import Option, QtoolError

ALL_LINEAR: Final = "all-linear"
# Output head of a language model, and of a classifier.
HEADS: Final = frozenset({"lm_head", "score"})
# Layers whose weight is read without calling them, so an adapter on them would be passed by. For
# those that kernels read PEFT raises ValueError (_check_lora_target_modules_mamba); dt_proj, which
# the code of these models multiplies with itself, it would wrap in vain.
_READ_BY_KERNELS: Final = frozenset({"out_proj", "conv1d"})
BYPASSED: Final = {
    "falcon_h1": _READ_BY_KERNELS,
    "falcon_mamba": _READ_BY_KERNELS | {"dt_proj"},
    "jamba": frozenset({"dt_proj"}),
    "mamba": _READ_BY_KERNELS | {"dt_proj"},
    "mamba2": _READ_BY_KERNELS,
    "nemotron_h": _READ_BY_KERNELS,
}

Targets = str | Sequence[str]


def features(tensor: ModelTensor) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, whichever way its weight is stored."""
    outputs, inputs = tensor.shape if tensor.kind == "linear" else tensor.shape[::-1]
    return inputs, outputs


def is_refused(model_type: str | None, module_name: str) -> bool:
    """Whether an adapter on the module is refused in a model of this type."""
    return module_name.rpartition(".")[2] in BYPASSED.get(model_type or "", ())


def refuse_bypassed(model_type: str | None, module_name: str) -> None:
    """Raise QtoolError (usage) for a target that would never be trained."""
    if is_refused(model_type, module_name):
        raise QtoolError(
            f"LoRA target {module_name}: {model_type} models read its weight without calling the "
            "layer, so an adapter on it would never be trained",
            kind="usage",
            hint=(Option("lora_targets", ALL_LINEAR), " leaves it out"),
        )


def target_layers(architecture: Architecture, targets: Targets) -> tuple[ModelTensor, ...]:
    """The weights of the linear layers that get adapters, in the model's order.

    Raises:
        QtoolError: "usage" for a name that matches no linear layer, with the nearest names, and for
            one that would never be trained.
    """
    model_type = architecture.model_type
    linears = [tensor for tensor in architecture.tensors.values() if tensor.is_linear]
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if len(names) == 1 and names[0].lower() == ALL_LINEAR:
        return tuple(
            tensor
            for tensor in linears
            if tensor.module_name not in HEADS and not is_refused(model_type, tensor.module_name)
        )
    for name in names:
        if not any(_matches(tensor, name) for tensor in linears):
            _refuse(name, linears)
    found = tuple(tensor for tensor in linears if any(_matches(tensor, name) for name in names))
    for tensor in found:
        refuse_bypassed(model_type, tensor.module_name)
    return found


def num_adapter_parameters(tensor: ModelTensor, r: int) -> int:
    """Parameters of lora_A [r, in] and lora_B [out, r]."""
    return r * sum(features(tensor))


def _matches(tensor: ModelTensor, name: str) -> bool:
    return tensor.module_name == name or tensor.module_name.endswith(f".{name}")


def _refuse(name: str, linears: Sequence[ModelTensor]) -> None:
    from difflib import get_close_matches  # slow to import, and only this refusal needs it

    known = list(dict.fromkeys(tensor.module_name.rpartition(".")[2] for tensor in linears))
    near = get_close_matches(name[:80], known, n=3) or known[:12]
    raise QtoolError(
        f"LoRA target {name[:80]!r} matches no linear layer of the model",
        kind="usage",
        hint=(Option("lora_targets", ALL_LINEAR), f", or names such as {', '.join(near)}"),
    )
