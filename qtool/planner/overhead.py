"""What a process takes from a GPU beside its tensors: driver context, library workspace, allocator.

None of it follows from the model; the numbers are what was measured on some GPUs, with a band that
holds the others.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from qtool.planner.records import Workload
from qtool.planner.units import GIB, MIB

# CUDA context with PyTorch's kernels loaded as they are used: 0.30 GiB on consumer GPUs, 0.47 on an
# A100, 0.55 on an H100, 0.61 and with cuBLAS in use 0.70 on an H200; 0.92 with eager loading.
CONTEXT_BYTES: Final = int(0.60 * GIB)
CONTEXT_LOW_BYTES: Final = int(0.30 * GIB)
CONTEXT_HIGH_BYTES: Final = int(0.92 * GIB)

# cuBLAS takes this from the allocator at the first matrix product: 32 MiB on Hopper, else 8.1.
CUBLAS_BYTES: Final = 32 * MIB
CUBLAS_LOW_BYTES: Final = 8_519_680

# vLLM reserves FlashInfer's workspace, and captures CUDA graphs (0.45 GiB for a 27B hybrid).
VLLM_WORKSPACE_BYTES: Final = 394 * MIB + int(0.45 * GIB)

# NCCL's buffers on each of 2, and of more GPUs.
NCCL_PAIR_BYTES: Final = 342_000_000
NCCL_BYTES: Final = 392_000_000

# What the caching allocator keeps beyond the peak of what it handed out, as a share of the memory
# that comes and goes (cache, activations, buffers): 13 to 23 % for prompts of 2,048 tokens and
# more, where each step makes tensors of new sizes; in training 24 to 31 % where activations are
# recomputed, 4 to 8 % where they are kept. Measured on an H200 with PyTorch's default settings.
GENERATE_SHARE: Final = 0.20
CHECKPOINTING_SHARE: Final = 0.27
TRAINING_SHARE: Final = 0.06
HIGH_OVER_POINT: Final = 1.5
ALLOCATOR_HIGH_BYTES: Final = 64 * MIB  # whole segments, however small the tensors


class Overhead(NamedTuple):
    """On each GPU. `workspace` comes out of the allocator, `context` does not; `allocator_share`
    of what comes and goes stays with the allocator."""

    context_bytes: int
    workspace_bytes: int
    workspace_low_bytes: int
    allocator_share: float = GENERATE_SHARE

    @classmethod
    def of(cls, workload: Workload, *, records_graph: bool = False) -> Overhead:
        """Of a workload's runtime; GPUs that split matrices talk to each other through NCCL.

        Args:
            records_graph: PyTorch's products are recorded, on a stream of their own.
        """
        trains, runtime = workload.mode != "generate", workload.runtime
        num_communicating = workload.gpus if workload.split == "tensor" else 1
        # One for each stream and thread: the backward pass has a thread of its own.
        num_workspaces = 2 if trains or records_graph else 1
        share = GENERATE_SHARE
        if trains:
            keeps = not workload.tuning.gradient_checkpointing
            share = TRAINING_SHARE if keeps else CHECKPOINTING_SHARE
        nccl_bytes = 0
        if num_communicating > 1:
            nccl_bytes = NCCL_PAIR_BYTES if num_communicating == 2 else NCCL_BYTES
        more_bytes = VLLM_WORKSPACE_BYTES if runtime == "vllm" else 0
        return cls(
            context_bytes=CONTEXT_BYTES + nccl_bytes,
            workspace_bytes=num_workspaces * CUBLAS_BYTES + more_bytes,
            workspace_low_bytes=num_workspaces * CUBLAS_LOW_BYTES + more_bytes,
            allocator_share=share,
        )

    def allocator_bytes(self, dynamic_bytes: int) -> int:
        """What the allocator keeps beside `dynamic_bytes` of cache, activations and buffers."""
        return int(self.allocator_share * dynamic_bytes)

    def band(self, allocated_peak_bytes: int, dynamic_bytes: int) -> tuple[int, int]:
        """The least and the most that a process can be expected to take at its peak.

        Least: the smallest context and workspace, an allocator that keeps nothing over (it gives
        back before it fails). Most: the largest context, much more for the allocator.
        """
        outside_bytes = self.context_bytes - CONTEXT_BYTES
        least = allocated_peak_bytes - self.workspace_bytes + self.workspace_low_bytes
        kept = int(HIGH_OVER_POINT * self.allocator_bytes(dynamic_bytes)) + ALLOCATOR_HIGH_BYTES
        return (
            least + CONTEXT_LOW_BYTES + outside_bytes,
            allocated_peak_bytes + kept + CONTEXT_HIGH_BYTES + outside_bytes,
        )
