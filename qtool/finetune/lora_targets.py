"""What LoRA is asked to adapt: refused where PEFT would do nothing, or fail in words of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from qtool.errors import Option, QtoolError
from qtool.planner.lora import ALL_LINEAR, HEADS, is_refused, refuse_bypassed
from qtool.runtime.linear import Linear4bit, LinearInt8

# Initializations that read or change the base weight as floating point are none of these.
INITIALIZATIONS: Final = (True, False, "gaussian", "eva")
_PACKED: Final = (Linear4bit, LinearInt8)
_MAX_NAMES: Final = 12
_MAX_NAME_LENGTH: Final = 80
_ADAPTED: Final = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    Conv1D,
    BaseTunerLayer,
)


def choose_layers(model: nn.Module, targets: Sequence[str] | None) -> str | list[str]:
    """`targets`, or all linear layers but the head, as PEFT is to be told of them.

    In most mixtures it takes "all-linear", and the names that the parts of experts had, for the
    experts too, which are parameters: it wraps them whole, without dropout and at a higher rank.

    Raises:
        QtoolError: usage, for names that it would take so; unsupported, if nothing else is left.
    """
    asked: str | list[str] = list(targets) if targets else _all_linear(model)
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # releases that leave the names as they are
        return asked
    probe = LoraConfig(target_modules=asked)
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # some of the names that were fused into one
        is_plain = False
    else:
        is_plain = not probe.target_parameters
    if is_plain:
        return asked
    if targets:
        raise QtoolError(
            (
                Option("lora_targets", ",".join(targets)),
                f": PEFT takes some of them for the experts of {type(model).__name__}, which are "
                "no layers of their own",
            ),
            kind="usage",
            hint=(Option("lora_targets", ALL_LINEAR), ", or names such as q_proj,v_proj"),
        )
    names = [n for n in _linear_names(model) if n in probe.target_modules and n not in HEADS]
    if not names:
        raise QtoolError(
            f"{type(model).__name__} has no linear layer beside its experts",
            kind="unsupported",
            hint=Option("method", "full"),
        )
    return sorted(names)


def _all_linear(model: nn.Module) -> str | list[str]:
    """PEFT's word for all linear layers, or the names of those that would be trained."""
    names = _linear_names(model)
    kept = [name for name in names if not is_refused(_model_type(model), name)]
    if kept == names:
        return ALL_LINEAR
    return sorted(name for name in kept if name not in HEADS)


def check_lora_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a config that would adapt nothing, or pretend to.

    PEFT builds adapters for packed parameters that are no module of their own, such as the experts
    of a mixture as one tensor, and then never uses them.

    Args:
        model: before it is wrapped, or with adapters already.

    Raises:
        QtoolError: usage, for a name that matches no layer, with the nearest names, and for a layer
            that PEFT refuses; unsupported, for packed parameters and for initializations that need
            the weight in floating point.
    """
    _check_parameters(model, config)
    _check_kept_modules(model, config)
    _check_initialization(model, config)
    _check_modules(model, config)


# -- modules --------------------------------------------------------------------------------------


def _check_modules(model: nn.Module, config: LoraConfig) -> None:
    targets = config.target_modules
    if targets is None:
        return  # PEFT knows the model's type, or says that it does not
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        if not _linear_names(model):
            raise _refusal(f"{type(model).__name__} has no linear layer to adapt", "", model)
        return
    names = [name for name, _ in model.named_modules() if name]
    for target in () if isinstance(targets, str) else sorted(targets):
        if not _matching(target, names):
            raise _refusal(f"LoRA target {_shown(target)} matches no layer", target, model)
    found = [name for name in names if _is_target(config, name)]
    if not found and not config.target_parameters:
        raise _refusal(f"LoRA targets {_shown(targets)} match no layer", "", model)
    for name in found:
        refuse_bypassed(_model_type(model), name)
        module = model.get_submodule(name)
        if isinstance(module, _ADAPTED):
            continue
        if any(_is_packed(module, part) for part, _ in module.named_parameters(recurse=False)):
            raise _packed_parameter(name)
        kind = type(module).__name__
        raise _refusal(f"LoRA target {_shown(name)} is a {kind}, not a layer", name, model)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _is_target(config: LoraConfig, name: str) -> bool:
    try:
        return bool(check_target_module_exists(config, name))
    except re.error as error:
        raise QtoolError(
            f"LoRA targets {_shown(config.target_modules)} are no regular expression: {error}",
            kind="usage",
            hint=(Option("lora_targets", ALL_LINEAR), ", or names of layers"),
        ) from None


def _matching(target: str, names: Iterable[str]) -> list[str]:
    """PEFT's rule: a module has the name, or ends in it."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of layers that can be adapted, each once."""
    names = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer) and ".lora_" not in name
    )
    return list(dict.fromkeys(names))


def _refusal(message: str, asked: str, model: nn.Module) -> QtoolError:
    """With the names nearest to what was asked for, or the first of all."""
    known = [name for name in _linear_names(model) if name not in HEADS]
    near = _nearest(asked.rpartition(".")[2], known) or known[:_MAX_NAMES]
    names = f", or names such as {', '.join(near)}" if near else ""
    return QtoolError(message, kind="usage", hint=(Option("lora_targets", ALL_LINEAR), names))


def _nearest(asked: str, known: Sequence[str]) -> list[str]:
    from difflib import get_close_matches  # slow to import, and only refusals need it

    return get_close_matches(asked[:_MAX_NAME_LENGTH], known, n=3)


def _shown(targets: Any) -> str:
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return repr(names[:_MAX_NAME_LENGTH])


# -- parameters, and modules that are trained whole -----------------------------------------------


def _check_parameters(model: nn.Module, config: LoraConfig) -> None:
    targets = getattr(config, "target_parameters", None) or ()
    if not targets:
        return
    owners = {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    for target in sorted(targets):
        found = _matching(target, owners)
        if not found:
            raise QtoolError(
                f"LoRA target {_shown(target)} matches no parameter",
                kind="usage",
                hint=f"names such as {', '.join(_near_parameters(target, owners))}",
            )
        for key in found:
            if _is_packed(*owners[key]):
                raise _packed_parameter(key)


def _near_parameters(target: str, known: Iterable[str]) -> list[str]:
    last_two = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in known))
    return _nearest(target, last_two) or last_two[:_MAX_NAMES]


def _is_packed(module: nn.Module, name: str) -> bool:
    """Whether the parameter holds codes: integers, or 16-bit storage of some."""
    parameter: Any = getattr(module, name)
    is_float = parameter.dtype.is_floating_point or parameter.dtype.is_complex
    is_stored = type(parameter).__name__ in {"Params4bit", "Int8Params"}
    return not is_float or is_stored or (isinstance(module, _PACKED) and name == "weight")


def _packed_parameter(name: str) -> QtoolError:
    return QtoolError(
        f"{name} is packed, and LoRA on a packed parameter would train nothing",
        kind="unsupported",
        hint=(
            "adapt layers that are modules (",
            Option("lora_targets", ALL_LINEAR),
            "), or a base whose experts are kept in 16 bit (",
            Option("experts", "keep", verb="quantize"),
            ")",
        ),
    )


def _check_kept_modules(model: nn.Module, config: LoraConfig) -> None:
    for target in config.modules_to_save or ():
        for name, module in model.named_modules():
            if _matching(target, [name]) and isinstance(module, _PACKED):
                raise QtoolError(
                    f"{name} is packed, and cannot be trained itself (modules_to_save)",
                    kind="unsupported",
                    hint="give it an adapter, or quantize the model without it",
                )


def _check_initialization(model: nn.Module, config: LoraConfig) -> None:
    how = config.init_lora_weights
    if how in INITIALIZATIONS or not any(isinstance(m, _PACKED) for m in model.modules()):
        return
    raise QtoolError(
        f"init_lora_weights={how!r} reads the base weights in floating point; here they are packed",
        kind="unsupported",
        hint=f"one of {', '.join(map(repr, INITIALIZATIONS))}",
    )
