"""The common decoder block on the processor: a step of one token without Python or PyTorch in it.

Prompts of more than one token go through the model's own operations, over the same cache. Before
use steps are compared with those operations.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from qtool.runtime.decoders.blocks import NotFusable
from qtool.runtime.decoders.caches import can_rewind, rewind, takes_chunks
from qtool.runtime.decoders.eager import EagerDecoder
from qtool.runtime.decoders.host_blocks import describe_host_network
from qtool.runtime.decoders.host_step import HostStep, StepLayer
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Path, Sampling
from qtool.runtime.loading import LoadedModel
from qtool.runtime.products_host import threads_for_products

REASON: Final = "one compiled step per token; prompts on the model's own operations"
# Of the largest logit: how far those of a step may be from those of the model's own operations.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.05}
# As many as the products of a short prompt take at once, whose kernel is wanted anyway.
NUM_COMPARED: Final = 8


class HostNetwork(Network):
    """A model whose steps of one token are a `HostStep`, over a cache of `StepLayer`s.

    Raises:
        NotFusable: what the step does not do.
    """

    def __init__(self, model: Any, prefill_chunk: int, *, capacity: int) -> None:
        super().__init__(model, prefill_chunk)
        self._network = describe_host_network(model)
        self._step = HostStep(
            model, self._network, capacity=capacity, num_threads=torch.get_num_threads()
        )

    def prepare(self, cache: Any) -> None:
        """Compare steps with the model's own operations; leaves the cache empty.

        Raises:
            NotFusable: the logits differ by more than rounding does.
        """
        tokens = torch.arange(1, NUM_COMPARED + 1)[None]
        expected = self._own_logits(tokens, cache)
        rewind(cache, 1)
        for at in range(1, NUM_COMPARED):
            difference = (self.step(int(tokens[0, at]), at, cache) - expected[at]).abs().max()
            # not >: a NaN is a difference too
            if not difference <= TOLERANCE[self._network.dtype] * expected[at].abs().max():
                raise NotFusable(f"the fused step gives other logits at token {at}")
        rewind(cache, 0)

    def step(self, token: int, position: int, cache: Any) -> Tensor:
        """Logits float32 (1, vocabulary) after `token`; the next step fills them anew."""
        return self._step.run(token, position, cache.layers)

    def logits(self, input_ids: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """See `Network.logits`."""
        if input_ids.shape[1] == 1 and all(layer.is_initialized for layer in cache.layers):
            return self.step(int(input_ids), int(positions), cache).clone()
        self.cache_changed()
        return super().logits(input_ids, positions, cache)

    def cache_changed(self) -> None:
        """There is another cache, or others put something in."""
        self._step.cache_changed()

    def _own_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits float32 (n, vocabulary) of the model's own operations after each of `tokens`."""
        self.cache_changed()
        positions = torch.arange(tokens.shape[1])[None]
        made = self.model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits: Tensor = made.logits[0].float()
        return logits


class HostFusedDecoder(EagerDecoder):
    """A decoder whose steps are compiled, see `protocol.Decoder`."""

    path: Path = "fused"

    def __init__(self, network: HostNetwork, cache: Any, *, capacity: int) -> None:
        super().__init__(network, capacity=capacity, batch=1, reason=REASON)
        self._host = network
        self._take(cache)

    def close(self) -> None:
        """See `protocol.Decoder`."""
        super().close()
        self._host.cache_changed()
        self._take(step_cache(self._host.model.config))

    def _take(self, cache: Any) -> None:
        self._cache = cache
        self.can_rewind = can_rewind(cache)
        self._in_chunks = takes_chunks(cache, self._network.model.config.model_type)

    @torch.inference_mode()
    def _step(self, tokens: Tensor, sampling: Sampling) -> Tensor:
        position = self._transcript.length
        with self._transcript.taking(tokens[:, None], position):
            self._logits = self._host.step(int(tokens), position, self._cache)
        # PyTorch's threads would go on spinning where the next step needs the processors.
        if sampling.temperature == 0:
            return torch.tensor([int(self._logits.numpy().argmax())])
        with threads_for_products():
            return self._choose(sampling)


def make_host_decoder(
    loaded: LoadedModel, *, capacity: int, prefill_chunk: int
) -> HostFusedDecoder:
    """A decoder whose step was compared with the model's own operations.

    Raises:
        NotFusable: what the step does not do, or that it computes something else.
    """
    try:
        network = HostNetwork(loaded.model, prefill_chunk, capacity=capacity)
    except AttributeError as missing:
        raise NotFusable(f"its blocks are built otherwise: {missing}") from missing
    cache = step_cache(loaded.model.config)
    with torch.inference_mode():
        network.prepare(cache)
    return HostFusedDecoder(network, cache, capacity=capacity)


def step_cache(config: Any) -> Any:
    """An empty cache of `StepLayer`s, for sliding windows too: masks hide what lies outside."""
    cache = DynamicCache(config=config)
    cache.layers = [StepLayer() for _ in cache.layers]
    return cache
