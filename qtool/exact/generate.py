"""A prompt and one more token, as transformers' `generate` runs them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qtool.exact.gpu_functions import GpuFunctions
from qtool.exact.moments import Moments
from qtool.exact.storages import LiveStorages


def run_generate(
    model: Any, storages: LiveStorages, moments: Moments, *, context: int, batch: int
) -> None:
    """Prefill `batch` prompts of `context` tokens and decode one token more."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with (
        storages,
        torch.no_grad(),
        GpuFunctions().running(),
        moments.followed(),
        watched(cache, moments),
    ):
        moments.phase = "prefill"
        ids = torch.zeros(batch, context, dtype=torch.long, device="meta")
        # The user's; `generate` drops it where no token is padding.
        mask = torch.ones_like(ids)
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        token = _step(model, ids, positions, cache, is_first_iteration=True)
        moments.phase = "decode"
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=-1)
        ids = torch.cat([ids, token[:, None]], dim=-1)
        _step(model, ids, positions, cache, next_sequence_length=1)


def _step(model: Any, ids: Tensor, positions: Tensor, cache: DynamicCache, **step: Any) -> Tensor:
    """One forward pass and the greedy choice of a token (batch,)."""
    known = inspect.signature(model.forward).parameters
    step |= {"cache_params" if "cache_params" in known else "past_key_values": cache}
    if "position_ids" in known:
        step["position_ids"] = positions
    if "logits_to_keep" in known:
        step["logits_to_keep"] = 1
    inputs = model.prepare_inputs_for_generation(ids, attention_mask=None, use_cache=True, **step)
    outputs = model(**inputs, return_dict=True)
    scores: Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    return scores.argmax(dim=-1)


@contextmanager
def watched(cache: Any, moments: Moments) -> Iterator[None]:
    """Tell `moments` while the cache stores something."""
    update = cache.update

    def told(*args: Any, **kwargs: Any) -> Any:
        moments.filling_cache = True
        try:
            return update(*args, **kwargs)
        finally:
            moments.filling_cache = False

    cache.update = told
    yield
