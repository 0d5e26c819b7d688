"""Optimizer states: bytes per trainable tensor.

    find_optimizer("paged_adamw_8bit").state_bytes((4096, 16), element_bytes=4)

Sources: torch/optim (states take the parameter's dtype), bitsandbytes/optim/optimizer.py (8-bit
states with one float32 per block of 256, float32 for small tensors and embeddings; paged states in
managed memory), transformers/optimization.py (Adafactor: float32 rows and columns).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from qtool.errors import Option, QtoolError
from qtool.planner.units import FLOAT32_BYTES

# bitsandbytes: `min_8bit_size` and the block size of the states' absmax.
MIN_8BIT_ELEMENTS: Final = 4096
BLOCK_ELEMENTS: Final = 256
# bitsandbytes: smaller states stay in device memory (`get_state_buffer`, 1e5 elements).
MIN_PAGED_ELEMENTS: Final = 100_000

# How a state is stored: in the parameter's dtype, in float32, in 8 bit, or as one number per row
# and per column of a matrix.
Storage = Literal["parameter", "float32", "8-bit", "factored"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer: how many states each parameter has and how they are stored.

    `is_paged` states lie in managed memory, of which a GPU holds between nothing and all.
    `aliases` are `transformers`' names for it (TrainingArguments.optim).
    """

    name: str
    num_states: int
    storage: Storage
    source: str
    is_paged: bool = False
    aliases: tuple[str, ...] = ()

    def state_bytes(
        self, shape: Sequence[int], element_bytes: int, *, is_embedding: bool = False
    ) -> int:
        """States of one tensor of `shape`; `element_bytes` of the parameter itself."""
        num_elements = math.prod(shape)
        if self.storage == "factored":
            return _factored_bytes(shape)
        if self.storage == "parameter":
            return self.num_states * num_elements * element_bytes
        if self.storage == "float32" or is_embedding or num_elements < MIN_8BIT_ELEMENTS:
            return self.num_states * num_elements * FLOAT32_BYTES
        blocks = -(-num_elements // BLOCK_ELEMENTS)
        return self.num_states * (num_elements + FLOAT32_BYTES * blocks)

    def is_paged_out(self, shape: Sequence[int]) -> bool:
        """Whether the states of a tensor of `shape` may leave the GPU."""
        return self.is_paged and math.prod(shape) >= MIN_PAGED_ELEMENTS


def _factored_bytes(shape: Sequence[int]) -> int:
    """Adafactor without momentum: rows + columns of each matrix, a vector as it is."""
    if len(shape) < 2:
        return math.prod(shape) * FLOAT32_BYTES
    *leading, rows, columns = shape
    return math.prod(leading) * (rows + columns) * FLOAT32_BYTES


_TORCH: Final = "torch/optim"
_BITSANDBYTES: Final = "bitsandbytes/optim"
OPTIMIZERS: Final = (
    Optimizer(
        "adamw", 2, "parameter", f"{_TORCH}/adamw.py", aliases=("adamw-torch", "adamw-torch-fused")
    ),
    Optimizer(
        "adamw-8bit",
        2,
        "8-bit",
        f"{_BITSANDBYTES}/adamw.py",
        aliases=("adamw8bit", "adamw-bnb-8bit"),
    ),
    Optimizer(
        "paged-adamw",
        2,
        "float32",
        f"{_BITSANDBYTES}/adamw.py",
        is_paged=True,
        aliases=("paged-adamw-32bit",),
    ),
    Optimizer(
        "paged-adamw-8bit",
        2,
        "8-bit",
        f"{_BITSANDBYTES}/adamw.py",
        is_paged=True,
        aliases=("paged-adamw8bit",),
    ),
    Optimizer("sgd", 0, "parameter", f"{_TORCH}/sgd.py"),
    Optimizer("sgd-momentum", 1, "parameter", f"{_TORCH}/sgd.py"),
    Optimizer("lion", 1, "float32", f"{_BITSANDBYTES}/lion.py", aliases=("lion-32bit",)),
    Optimizer("lion-8bit", 1, "8-bit", f"{_BITSANDBYTES}/lion.py", aliases=("lion8bit",)),
    Optimizer("adafactor", 1, "factored", "transformers/optimization.py"),
)


def find_optimizer(name: str) -> Optimizer:
    """The optimizer called `name`, in this project's or transformers' words.

    Raises:
        QtoolError: "usage", with the nearest names, for any other.
    """
    wanted = name.lower().replace("_", "-")
    for optimizer in OPTIMIZERS:
        if wanted in (optimizer.name, *optimizer.aliases):
            return optimizer
    from difflib import get_close_matches  # slow to import, and only this refusal needs it

    names = [optimizer.name for optimizer in OPTIMIZERS]
    near = get_close_matches(wanted, names, n=3)
    raise QtoolError(
        f"optimizer {name[:80]!r} is not known; known: {', '.join(names)}",
        kind="usage",
        hint=f"nearest: {', '.join(near)}"
        if near
        else ("choose one of these with ", Option("optimizer")),
    )
