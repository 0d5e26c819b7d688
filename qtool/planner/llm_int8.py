"""LLM.int8() products as bitsandbytes makes them: what they take beside inputs and weights.

Inputs are rounded to 8 bit and multiplied into int32, which becomes float16. Columns of the input
that hold a value beyond the threshold, outliers, are multiplied again with their columns of the
weight. float32 inputs become float16 first, and outputs float32 again. Sources: MatMul8bitLt and
the int8 operators of bitsandbytes 0.50; 16-bit inputs are taken to be float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from qtool.planner.units import HALF_BYTES

THRESHOLD: Final = 6.0
USUAL_INITIALIZER_RANGE: Final = 0.02

CODE_BYTES: Final = 1
ROW_STATISTICS_BYTES: Final = 4
LOOKING_BYTES: Final = 3  # per input: its absolute value in 16 bit, and whether that is an outlier
OUTPUT_BYTES: Final = 6  # int32, and float16 made from it
# Those with outliers, by name: the MLP's last, as far as a config tells.
LAST_MLP_LAYERS: Final = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
COLUMN_BYTES: Final = 9  # of an outlier's weight: its code, float32, and float32 once more

INTEGRATION_STEPS: Final = 2000
INTEGRATION_LIMIT: Final = 8.0  # standard deviations


class Int8Moment(NamedTuple):
    """Bytes at one moment of a product: activations, and what is made of the weight."""

    activations_bytes: int
    weight_bytes: int


def int8_moments(
    *,
    tokens: int,
    hidden: int,
    mlp: int,
    first_width: int,
    beside_first: int,
    outliers: float,
    element_bytes: int,
) -> tuple[Int8Moment, ...]:
    """The moments of an MLP that may be the largest, beside the layer's hidden states.

    Args:
        first_width: of the output of the largest first linear layer, `beside_first` MLP-sized
            tensors alive with it.
        outliers: the share of the second layer's input columns that hold one.
        element_bytes: of activations.
    """
    is_float32 = element_bytes != HALF_BYTES
    one_mlp = tokens * element_bytes * mlp
    copied = tokens * HALF_BYTES * mlp if is_float32 else 0  # while outliers are looked for
    output_bytes = OUTPUT_BYTES + (element_bytes if is_float32 else 0)
    codes = tokens * (CODE_BYTES * mlp + ROW_STATISTICS_BYTES)
    outlier_inputs = int(one_mlp * outliers)
    columns = math.ceil(mlp * outliers) * hidden
    return (
        Int8Moment(
            beside_first * one_mlp + tokens * (CODE_BYTES * hidden + output_bytes * first_width), 0
        ),
        Int8Moment(one_mlp + copied + codes + tokens * LOOKING_BYTES * mlp, 0),
        Int8Moment(one_mlp + codes + outlier_inputs, COLUMN_BYTES * columns),
        Int8Moment(
            one_mlp + codes + outlier_inputs + tokens * output_bytes * hidden,
            element_bytes * columns,
        ),
    )


def outlier_share(hidden: int, tokens: int, config: Mapping[str, Any]) -> float:
    """The share of a gated MLP's columns with an outlier, were the weights as drawn at first.

    Which columns hold one depends on weights and text. This is the share for normal weights with
    the deviation that config.json names (`initializer_range`): gate and up projection then are
    normal with sqrt(hidden) times as much.
    """
    initializer_range = config.get("initializer_range")
    if not isinstance(initializer_range, float) or not 0 < initializer_range < 1:
        initializer_range = USUAL_INITIALIZER_RANGE
    return 1 - (1 - _outlier_probability(hidden, initializer_range)) ** tokens


@cache
def _outlier_probability(hidden: int, initializer_range: float) -> float:
    """P(|silu(gate) * up| > threshold), by the trapezoidal rule over the gate."""
    deviation = initializer_range * math.sqrt(hidden)
    step = 2 * INTEGRATION_LIMIT / INTEGRATION_STEPS
    total = 0.0
    for index in range(INTEGRATION_STEPS + 1):
        z = -INTEGRATION_LIMIT + index * step
        gate = z * deviation
        activated = abs(gate / (1 + math.exp(-gate)))
        if activated > 0:
            beyond = math.erfc(THRESHOLD / activated / deviation / math.sqrt(2))
            total += math.exp(-z * z / 2) * beyond * step
    return total / math.sqrt(2 * math.pi)
