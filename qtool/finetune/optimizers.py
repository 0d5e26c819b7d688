"""The optimizers that `estimate --optimizer` plans, as classes for the Trainer.

cls, kwargs = optimizer_class("paged-adamw-8bit", lr=2e-4, weight_decay=0.0)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.optim import SGD, AdamW, Optimizer
from transformers import Adafactor

from qtool.optim import AdamW8bit, Lion8bit, PagedAdamW8bit, keep_32bit
from qtool.planner.optimizers import find_optimizer

MOMENTUM: Final = 0.9
# Adafactor as an optimizer that takes the learning rate it is given.
ADAFACTOR: Final = {"scale_parameter": False, "relative_step": False, "warmup_init": False}


class PagedAdamW(PagedAdamW8bit):
    """AdamW with float32 states in managed memory."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        _keep_32bit(self)


class Lion(Lion8bit):
    """Lion with a float32 state."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        _keep_32bit(self)


def optimizer_class(
    name: str, *, lr: float, weight_decay: float
) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The class, and its arguments beside the parameters.

    Raises:
        QtoolError: (usage) a name that `estimate` does not know either.
    """
    found = find_optimizer(name).name
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    match found:
        case "adamw":
            return AdamW, options | ({"fused": True} if torch.cuda.is_available() else {})
        case "sgd":
            return SGD, options
        case "sgd-momentum":
            return SGD, options | {"momentum": MOMENTUM}
        case "adafactor":
            return Adafactor, options | ADAFACTOR
    classes: dict[str, Callable[..., Optimizer]] = {
        "adamw-8bit": AdamW8bit,
        "paged-adamw": PagedAdamW,
        "paged-adamw-8bit": PagedAdamW8bit,
        "lion": Lion,
        "lion-8bit": Lion8bit,
    }
    return classes[found], options


def _keep_32bit(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        keep_32bit(*group["params"])
