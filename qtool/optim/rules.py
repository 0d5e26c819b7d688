"""What an update depends on beside the tensors: the algorithm, hyperparameters, the step.

    scalars_of("adam", Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.01), step=1)

All is float64 and rounded to float32 once; `cupy_kernels/optimizer_scalars.cu` computes the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

Algorithm = Literal["adam", "lion", "momentum"]


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Of a group of parameters.

    Attributes:
        learning_rate: a tensor of one value too.
        beta1: momentum, for that algorithm.
        weight_decay: decoupled, but for momentum, where it is added to the gradient.
    """

    learning_rate: float | Tensor
    beta1: float
    beta2: float = 0.0
    epsilon: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Scalars:
    """float32 numbers; `keep` is what a new gradient counts, 1 - beta.

    Attributes:
        step_size: negative.
        epsilon: of Adam, with its correction; of momentum the weight decay.
        decay: what values are multiplied by.
    """

    step_size: float
    epsilon: float
    decay: float
    beta1: float
    keep1: float
    beta2: float
    keep2: float


def scalars_of(algorithm: Algorithm, settings: Hyperparameters, step: int) -> Scalars:
    """For update number `step`, from 1 on."""
    rate = float(settings.learning_rate)
    step_size, epsilon, decay = -rate, 0.0, 1.0 - rate * settings.weight_decay
    if algorithm == "adam":
        correction1 = 1.0 - _power(settings.beta1, step)
        correction2 = math.sqrt(1.0 - _power(settings.beta2, step))
        step_size = -rate * correction2 / correction1
        epsilon = settings.epsilon * correction2
    elif algorithm == "momentum":
        epsilon, decay = settings.weight_decay, 1.0
    return Scalars(
        step_size=_rounded(step_size),
        epsilon=_rounded(epsilon),
        decay=_rounded(decay),
        beta1=_rounded(settings.beta1),
        keep1=_rounded(1.0 - settings.beta1),
        beta2=_rounded(settings.beta2),
        keep2=_rounded(1.0 - settings.beta2),
    )


def _power(base: float, exponent: int) -> float:
    """By squaring, so that the host and the kernel multiply in the same order."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _rounded(value: float) -> float:
    return float(np.float32(value))
