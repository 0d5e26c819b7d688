"""A transformers model as decoders call it: tokens and a cache in, the last logits out."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from qtool.errors import QtoolError

# State-space models call their cache so.
STATE_CACHE: Final = "cache_params"
ATTENTION_CACHE: Final = "past_key_values"
# Rotary embeddings whose frequencies depend on how long the text is.
LENGTH_DEPENDENT_ROTARY: Final = ("longrope", "dynamic")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make it the current one, on which kernels are loaded and launched, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Network:
    """A model's forward pass over a cache.

    Args:
        model: a transformers model for text generation.
        prefill_chunk: the most tokens that go through at once.
        device: where tokens go in and logits come out; that of the embedding if None.
    """

    def __init__(
        self, model: Any, prefill_chunk: int, *, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.device: torch.device = device or model.get_input_embeddings().weight.device
        self._prefill_chunk = prefill_chunk
        self._short_length = _length_of_short_texts(model.config.get_text_config())
        takes = inspect.signature(model.forward).parameters
        self._cache_argument = STATE_CACHE if STATE_CACHE in takes else ATTENTION_CACHE
        self._takes_positions = "position_ids" in takes
        # Else the logits of a whole chunk would be made: a vocabulary wide, for one row of use.
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def wants_whole(self, length: int) -> bool:
        """Whether a prompt of `length` tokens has to run at once: its parts would take the
        frequencies of shorter texts."""
        return self._short_length is not None and length > self._short_length

    def logits(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """What follows the last token; the cache takes the tokens up.

        Args:
            input_ids: int64 (batch, num_tokens) on the model's device.
            positions: int64 (batch, num_tokens), where they stand.

        Returns:
            float (batch, vocabulary).
        """
        return self._run_model(input_ids, positions, cache, **self._last_alone)[:, -1]

    def all_logits(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The same after each token, float (batch, num_tokens, vocabulary), by the model itself."""
        return self._run_model(input_ids, positions, cache)

    def _run_model(
        self, input_ids: Tensor, positions: Tensor, cache: Any, **arguments: Any
    ) -> Tensor:
        arguments |= {self._cache_argument: cache, "use_cache": True}
        if self._takes_positions:
            arguments["position_ids"] = positions
        # No attention mask: there is no padding, and without one nothing is checked on the host.
        logits: Tensor = self.model(input_ids=input_ids, **arguments).logits
        return logits

    def prefill(self, input_ids: Tensor, start: int, cache: Any, *, in_chunks: bool) -> Tensor:
        """The same for a prompt of any length from position `start` on, whole or in chunks."""
        batch, num_tokens = input_ids.shape
        input_ids = input_ids.to(self.device)
        positions = torch.arange(start, start + num_tokens, device=self.device).expand(batch, -1)
        step = self._prefill_chunk if in_chunks else num_tokens
        for first in range(0, num_tokens, step):
            chunk = slice(first, first + step)
            logits = self.logits(input_ids[:, chunk], positions[:, chunk], cache)
        return logits


def _length_of_short_texts(config: Any) -> int | None:
    """Up to how many tokens the rotary frequencies are the same; None if they always are."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # Either one set, or one for each kind of layer.
    for rotary in (parameters, *parameters.values()):
        if isinstance(rotary, dict) and rotary.get("rope_type") in LENGTH_DEPENDENT_ROTARY:
            original = rotary.get("original_max_position_embeddings")
            return int(original or config.max_position_embeddings)
    return None


def check_room(start: int, num_tokens: int, capacity: int) -> None:
    """QtoolError if a cache of `capacity` tokens cannot take these."""
    if start + num_tokens > capacity:
        raise QtoolError(
            f"{start + num_tokens} tokens do not go into a cache of {capacity}",
            kind="usage",
            hint="make the decoder with a larger capacity",
        )
