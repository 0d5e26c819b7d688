"""The memory that a PyTorch program allocates, counted storage by storage on the meta device.

Runs the real modules of transformers without a GPU and without memory: every operator reports the
shapes of its outputs, and a storage counts until the last tensor over it is gone. The fused
attention kernel is replaced by what it allocates on a GPU; everything else is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALLOCATION_BYTES = 512  # PyTorch's allocator on CUDA rounds every request up to this


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators create; `peak_bytes` is the most alive at once."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._existing = {_key(tensor) for tensor in existing}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_iter(result):
            if (
                isinstance(tensor, Tensor)
                and _key(tensor) not in self._existing | self._live.keys()
            ):
                storage = tensor.untyped_storage()
                num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
                self._live[_key(tensor)] = (StorageWeakRef(storage), num_bytes)
        total_bytes = sum(num_bytes for _, num_bytes in self._live.values())
        self.peak_bytes = max(self.peak_bytes, total_bytes)
        return result


def peak_bytes(work: Callable[[], object], existing: Iterable[Tensor] = ()) -> int:
    """The most that `work` has allocated at once, beside the storages of `existing`."""
    with torch.no_grad(), LiveStorages(existing) as storages:
        work()
    return storages.peak_bytes


def prefill_peak_bytes(model: Any, *, context: int, batch: int) -> int:
    """The same for one forward pass over `batch` prompts, as `generate` makes it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())

    def forward() -> None:
        ids = torch.zeros(batch, context, dtype=torch.long, device="meta")
        # The mask says that no token is padding, which the meta device cannot look up.
        extra = torch.empty_like(ids)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        del extra

    tensors = [*model.parameters(), *model.buffers()]
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention):
        return peak_bytes(forward, tensors)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What a fused kernel allocates: the output, and one float32 per query."""
    batch, heads, tokens, _ = query.shape
    torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    shape = (batch, tokens, heads, value.shape[-1])
    return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)


def _key(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata
