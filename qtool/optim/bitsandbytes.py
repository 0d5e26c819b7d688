"""State dicts of bitsandbytes' optimizers to ours and back. The package itself is not needed.

    theirs.load_state_dict(to_bitsandbytes(ours.state_dict()))
    ours.load_state_dict(from_bitsandbytes(theirs.state_dict(), AdamW8bit))

Codes and absmax are the same bytes; they nest what belongs to a parameter, with the maps beside
it, and count steps in Python. Their AdamW8bit, Adam8bit, Lion8bit and SGD8bit, paged or not, are
ours of the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebooks import dynamic_map
from qtool.optim.rules import Algorithm
from qtool.optim.states import ParameterState, bits_of, state_names

if TYPE_CHECKING:
    from qtool.optim.optimizers import EightBitOptimizer

NESTED_KEY: Final = "__bnb_optimizer_quant_state__"
# What their groups have beside ours; none of it has to do with these algorithms.
_ADAM_OPTIONS: Final = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}

StateDict = dict[str, Any]


def to_bitsandbytes(state_dict: StateDict) -> StateDict:
    """Of `state_dict()` of ours, for `load_state_dict` of the class of the same name.

    Tensors are shared, not copied.

    Raises:
        QtoolError: a state that is not contiguous, which they take for contiguous.
    """
    return {
        "state": {number: _nested(state) for number, state in state_dict["state"].items()},
        "param_groups": [_their_group(group) for group in state_dict["param_groups"]],
    }


def from_bitsandbytes(state_dict: StateDict, optimizer: type[EightBitOptimizer]) -> StateDict:
    """Of `state_dict()` of theirs, for `load_state_dict` of our class `optimizer`.

    Tensors are shared, not copied.

    Raises:
        QtoolError: states that are neither float32 nor 8 bit in blocks of 256 with the dynamic map.
    """
    algorithm = optimizer.algorithm
    return {
        "state": {number: _flat(state, algorithm) for number, state in state_dict["state"].items()},
        "param_groups": [_our_group(group, algorithm) for group in state_dict["param_groups"]],
    }


def _nested(state: ParameterState) -> ParameterState:
    tensors = {name: tensor for name, tensor in state.items() if name != "step"}
    if not all(tensor.is_contiguous() for tensor in tensors.values()):
        raise QtoolError(
            "a state is not contiguous, as its parameter was not; bitsandbytes cannot have it",
            kind="unsupported",
            hint="convert the state of a model in the default memory format",
        )
    if "absmax1" in tensors:
        device = tensors["absmax1"].device
        for i in (1, 2):
            if f"state{i}" in tensors:
                tensors[f"qmap{i}"] = _map(i).to(device)
    return {"step": int(state["step"]), NESTED_KEY: tensors}


def _flat(state: ParameterState, algorithm: Algorithm) -> ParameterState:
    flat = {key: value for key, value in state.items() if key != NESTED_KEY}
    flat |= state.get(NESTED_KEY, {})  # before 0.49.2 nothing was nested
    for i in (1, 2):
        quant_map = flat.pop(f"qmap{i}", None)
        if quant_map is not None and not torch.equal(quant_map.cpu(), _map(i)):
            raise _refusal("its code is not the dynamic map")
    names = state_names(algorithm, bits_of(flat))
    if set(flat) != set(names):
        raise _refusal(f"it has {', '.join(sorted(flat))} instead of {', '.join(names)}")
    num_blocks = -(-flat["state1"].numel() // 256)
    if "absmax1" in flat and flat["absmax1"].numel() != num_blocks:
        raise _refusal("its blocks are not of 256 values")
    return flat


def _refusal(reason: str) -> QtoolError:
    return QtoolError(
        f"a state of bitsandbytes cannot be taken over: {reason}",
        kind="unsupported",
        hint="only AdamW, Adam, Lion and SGD with momentum of bitsandbytes 0.44 and newer can be",
    )


def _their_group(group: dict[str, Any]) -> dict[str, Any]:
    options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
    if "momentum" in group:
        options |= {"betas": (group["momentum"], 0), "eps": 0.0}
    else:
        options |= {"betas": tuple(group["betas"]), "eps": group.get("eps", 0.0)}
    if "eps" in group:
        options |= _ADAM_OPTIONS
    return group | options


def _our_group(group: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    beta1, beta2 = group["betas"][:2]
    ours = {key: value for key, value in group.items() if key not in {*_ADAM_OPTIONS, "betas"}}
    if algorithm == "momentum":
        ours["momentum"] = beta1
    else:
        ours["betas"] = (beta1, beta2)
    if algorithm != "adam":
        ours.pop("eps", None)
    return ours


def _map(number: int) -> Tensor:
    return torch.tensor(dynamic_map(signed=number == 1))
