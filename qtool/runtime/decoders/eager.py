"""Operation by operation over a cache that grows: any model, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from qtool.runtime.decoders.caches import can_rewind, growing_cache, rewind, takes_chunks
from qtool.runtime.decoders.network import Network, check_room
from qtool.runtime.decoders.protocol import Path, Sampling
from qtool.runtime.decoders.sampling import (
    choose_tokens,
    mark_nan,
    require_tokens,
    seed_generator,
)
from qtool.runtime.decoders.transcript import Transcript
from qtool.runtime.linear import Linear4bit, LinearInt8
from qtool.runtime.products_host import threads_for_products


class EagerDecoder:
    """A decoder that runs each operation when Python comes to it, see `protocol.Decoder`.

    Args:
        reason: why no faster one was taken, for people.
    """

    path: Path = "eager"

    def __init__(self, network: Network, *, capacity: int, batch: int, reason: str) -> None:
        self.path_reason = reason
        self.capacity = capacity
        self._network = network
        on_cpu = network.device.type == "cpu"
        self._multiplies_packed = on_cpu and any(
            isinstance(module, Linear4bit | LinearInt8) for module in network.model.modules()
        )
        self._cache = growing_cache(network.model.config)
        self.can_rewind = can_rewind(self._cache)
        self._in_chunks = takes_chunks(self._cache, network.model.config.model_type)
        self._transcript = Transcript(batch, capacity)
        self._generator = torch.Generator(network.device)
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, start: int) -> None:
        """See `protocol.Decoder`."""
        check_room(start, input_ids.shape[1], self.capacity)
        in_chunks = self._in_chunks and not self._network.wants_whole(start + input_ids.shape[1])
        goes_on = in_chunks and (self.can_rewind or self._transcript.is_exactly(start))
        if start > 0 and not goes_on:
            input_ids, start = self._transcript.whole(input_ids, start), 0
        self._forget_from(start)
        with self._transcript.taking(input_ids, start):
            self._logits = self._network.prefill(input_ids, start, self._cache, in_chunks=in_chunks)

    def decode(self, sampling: Sampling, num_tokens: int) -> Iterator[list[int]]:
        """See `protocol.Decoder`; nothing runs ahead."""
        seed_generator(self._generator, sampling.seed)
        tokens = self._choose(sampling)
        require_tokens(mark_nan(tokens, self._logits).tolist())
        num_tokens = min(num_tokens, self._transcript.num_free + 1)
        for num_left in range(num_tokens - 1, -1, -1):
            yield tokens.tolist()
            if num_left:
                tokens = self._step(tokens, sampling)

    def close(self) -> None:
        """See `protocol.Decoder`."""
        self._cache = growing_cache(self._network.model.config)
        self._transcript.forget()

    def _forget_from(self, start: int) -> None:
        if self.can_rewind:
            rewind(self._cache, start)
        elif start == 0:
            self._cache = growing_cache(self._network.model.config)

    @torch.inference_mode()
    def _step(self, tokens: Tensor, sampling: Sampling) -> Tensor:
        """Tokens int64 (batch,) -> those that follow."""
        input_ids = tokens[:, None]
        position = self._transcript.length
        with self._transcript.taking(input_ids, position):
            positions = torch.full_like(input_ids, position)
            with threads_for_products() if self._multiplies_packed else nullcontext():
                self._logits = self._network.logits(input_ids, positions, self._cache)
        return self._choose(sampling)

    @torch.inference_mode()
    def _choose(self, sampling: Sampling) -> Tensor:
        return choose_tokens(self._logits, sampling, self._generator)
