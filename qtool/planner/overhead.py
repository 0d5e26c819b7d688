"""What a process takes from a GPU beside its tensors: driver context, library workspace, allocator.

None of it follows from the model; the numbers are what was measured on some GPUs, with a band that
holds the others.
"""

from __future__ import annotations

from typing import Final

MIB = 1 << 20
GIB = 1 << 30

# CUDA context with PyTorch's kernels loaded as they are used: 0.30 GiB on consumer GPUs, 0.47 on an
# A100, 0.55 on an H100, 0.61 and with cuBLAS in use 0.70 on an H200; 0.92 with eager loading.
CONTEXT_BYTES: Final = int(0.60 * GIB)
CONTEXT_LOW_BYTES: Final = int(0.30 * GIB)
CONTEXT_HIGH_BYTES: Final = int(0.92 * GIB)

# cuBLAS takes this from the allocator at the first matrix product: 32 MiB on Hopper, else 8.1.
WORKSPACE_BYTES: Final = 32 * MIB
WORKSPACE_LOW_BYTES: Final = 8_519_680

# What the caching allocator keeps beyond the peak of what it handed out, as a share of the memory
# that comes and goes (cache, activations, buffers). 13 to 23 % was measured for prompts of 2,048
# tokens and more, where each step makes tensors of new sizes.
ALLOCATOR_SHARE: Final = 0.20
ALLOCATOR_HIGH_SHARE: Final = 0.30
ALLOCATOR_HIGH_BYTES: Final = 64 * MIB  # whole segments, however small the tensors


def allocator_bytes(dynamic_bytes: int) -> int:
    """What the allocator keeps beside `dynamic_bytes` of cache, activations and buffers."""
    return int(ALLOCATOR_SHARE * dynamic_bytes)


def peak_band(allocated_peak_bytes: int, dynamic_bytes: int) -> tuple[int, int]:
    """The least and the most that a process can be expected to take at its peak.

    Least: the smallest context and workspace, an allocator that keeps nothing over (it gives back
    before it fails). Most: the largest context, half as much again for the allocator.
    """
    low = allocated_peak_bytes - WORKSPACE_BYTES + WORKSPACE_LOW_BYTES + CONTEXT_LOW_BYTES
    kept = int(ALLOCATOR_HIGH_SHARE * dynamic_bytes) + ALLOCATOR_HIGH_BYTES
    return low, allocated_peak_bytes + kept + CONTEXT_HIGH_BYTES
