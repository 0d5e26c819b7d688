"""What is taken where nothing is said, and how far options go, for commands and the Python API."""

from __future__ import annotations

import math
from typing import Final

# Tokens of a prompt that go through the model at once. Twice as many are 5 % faster and take twice
# the activations, half as many are 9 % slower (docs/generate.md).
PREFILL_CHUNK: Final = 1024

LEAST_TEMPERATURE: Final = 1e-6  # but for 0: divided by less, logits overflow
MAX_SEED: Final = (1 << 63) - 1  # of a torch.Generator, and never negative


def is_temperature(value: float) -> bool:
    """Whether it is 0, or logits can be divided by it."""
    return value == 0 or LEAST_TEMPERATURE <= value < math.inf


def is_top_p(value: float) -> bool:
    """Whether it is a probability that tokens can make up."""
    return 0 < value <= 1
