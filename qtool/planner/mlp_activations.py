"""What an MLP's activation takes: the tensors as wide as the MLP that it makes.

A fused one is one kernel that keeps its input; transformers spells others out in Python, operation
by operation (activations.py), and each operation makes a tensor. Under autocast `torch.pow` and all
that follows it are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qtool.architecture import Architecture
from qtool.planner.units import FLOAT32_BYTES


@dataclass(frozen=True, slots=True)
class MlpActivation:
    """Tensors of an activation: `alive` at once at most, input and output among them.

    Of what the backward pass reads `kept` are in the dtype of the input, `kept_float32` under
    autocast in float32; then the output is float32, too. `backward` are those of the output's dtype
    that this pass itself has at once.
    """

    alive: int
    kept: int
    kept_float32: int = 0
    backward: int = 2

    def kept_bytes(self, element_bytes: int) -> int:
        """Per element, of an input of so many."""
        return self.kept * element_bytes + self.kept_float32 * FLOAT32_BYTES

    def output_bytes(self, element_bytes: int) -> int:
        """Per element, of an input of so many."""
        return FLOAT32_BYTES if self.kept_float32 else element_bytes


FUSED: Final = MlpActivation(alive=2, kept=1)
# Its output, which the next layer keeps anyway.
KEEPS_NOTHING: Final = MlpActivation(alive=2, kept=0)
# x/2 beside the powers of x, what tanh makes of them, and one more than that.
TANH_OF_POWERS: Final = MlpActivation(alive=4, kept=1, kept_float32=3, backward=3)
OTHERS: Final = {
    "bloom_gelu": MlpActivation(alive=6, kept=1),
    "gelu_accurate": TANH_OF_POWERS,
    "gelu_fast": MlpActivation(alive=5, kept=7),
    "gelu_new": TANH_OF_POWERS,
    "gelu_python": MlpActivation(alive=4, kept=3, backward=5),
    "gelu_python_tanh": TANH_OF_POWERS,
    "quick_gelu": MlpActivation(alive=3, kept=2),
    "relu": KEEPS_NOTHING,
    "relu2": MlpActivation(alive=3, kept=1, backward=3),
}


def mlp_activation(architecture: Architecture) -> MlpActivation:
    """That of the model's MLPs."""
    return OTHERS.get(architecture.activation, FUSED)
