"""Optimizers with 8-bit states: a quarter of the memory of float32 ones, or less.

    from qtool.optim import AdamW8bit

    optimizer = AdamW8bit(model.parameters(), lr=1e-4)

They are `torch.optim.Optimizer`s, on NVIDIA GPUs and on the CPU. docs/optimizers.md tells more.
"""

from qtool.optim.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from qtool.optim.optimizers import (
    Adam8bit,
    AdamW8bit,
    EightBitOptimizer,
    Lion8bit,
    PagedAdam8bit,
    PagedAdamW8bit,
    PagedLion8bit,
    SGD8bit,
)
from qtool.optim.states import keep_32bit, keep_embeddings_32bit

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "EightBitOptimizer",
    "Lion8bit",
    "PagedAdam8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
    "SGD8bit",
    "from_bitsandbytes",
    "keep_32bit",
    "keep_embeddings_32bit",
    "to_bitsandbytes",
]
