"""One CUDA graph per token over a cache of fixed size: any model that such a cache suits.

The graph runs the model on the last token, chooses the next and puts it where the following replay
reads it. So the host only launches graphs, ahead of the tokens that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from qtool.runtime.decoders.caches import (
    cache_does_not_fit,
    can_rewind,
    rewind,
    takes_chunks,
)
from qtool.runtime.decoders.capture import Capture, CaptureFailed, GraphCapture, first_line
from qtool.runtime.decoders.network import Network, check_room, on_device
from qtool.runtime.decoders.protocol import Path, Sampling
from qtool.runtime.decoders.sampling import (
    choose_tokens,
    mark_nan,
    require_tokens,
    seed_generator,
)
from qtool.runtime.decoders.token_ring import TokenRing, run_ahead
from qtool.runtime.decoders.transcript import Transcript

REASON: Final = "one CUDA graph per token over a static cache"
GREEDY: Final = Sampling()
# A graph is compared with the steps that it was recorded from, over so many tokens: a position
# that the model counts on the host stands still in the graph, and the second step shows it.
NUM_COMPARED: Final = 3
TOLERANCE: Final = 0.02  # of the largest logit; the same kernels run, so usually nothing differs


class GraphDecoder:
    """A decoder whose steps are graphs, see `protocol.Decoder`.

    Args:
        cache: an empty one, from `fixed_cache`.
        capture: makes graphs of steps; the device's own if None.

    Raises:
        CaptureFailed: the model's step cannot be recorded, or a recording gives other logits.
        QtoolError: memory, if the cache does not fit.
    """

    path: Path = "graph"
    path_reason = REASON

    def __init__(
        self,
        network: Network,
        cache: Any,
        *,
        capacity: int,
        batch: int,
        capture: Capture | None = None,
    ) -> None:
        self.capacity = capacity
        self._network = network
        self._cache = cache
        self._capture = capture or GraphCapture(network.device)
        self.can_rewind = can_rewind(cache)
        self._in_chunks = takes_chunks(cache, network.model.config.model_type)
        self._transcript = Transcript(batch, capacity)
        self._generator = torch.Generator(network.device)
        self._input_ids = torch.zeros(batch, 1, dtype=torch.int64, device=network.device)
        self._position = torch.zeros_like(self._input_ids)
        self._ring = TokenRing(batch, network.device)
        self._logits = torch.empty(0)  # of prefill
        self._step_logits = torch.empty(0)  # of the last step; a graph rewrites its own
        self._graphs: dict[Sampling, Callable[[], None]] = {}
        try:
            with on_device(network.device):
                self._check_graph()
        except torch.OutOfMemoryError as error:
            told = cache_does_not_fit(cache, capacity, network.device)
            raise told or error from error

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, start: int) -> None:
        """See `protocol.Decoder`."""
        with on_device(self._network.device):
            self._prefill(input_ids, start)

    def _prefill(self, input_ids: Tensor, start: int) -> None:
        check_room(start, input_ids.shape[1], self.capacity)
        in_chunks = self._in_chunks and not self._network.wants_whole(start + input_ids.shape[1])
        goes_on = in_chunks and (self.can_rewind or self._transcript.is_exactly(start))
        if start > 0 and not goes_on:
            input_ids, start = self._transcript.whole(input_ids, start), 0
        self._forget_from(start)
        with self._transcript.taking(input_ids, start):
            self._logits = self._network.prefill(input_ids, start, self._cache, in_chunks=in_chunks)

    def decode(self, sampling: Sampling, num_tokens: int) -> Iterator[list[int]]:
        """See `protocol.Decoder`; up to STEPS_AHEAD tokens are made before they are read."""
        self._require_open()
        num_tokens = min(num_tokens, self._transcript.num_free + 1)
        with on_device(self._network.device):
            replay = self._graph_for(sampling)
            seed_generator(self._generator, sampling.seed)

        @torch.inference_mode()
        def launch(step: int) -> None:
            self._require_open()  # a graph would write where the cache was
            with on_device(self._network.device):
                if step == 0:
                    self._choose_first(sampling)
                else:
                    replay()
                self._ring.send(step)

        tokens: list[int] = []
        self._transcript.ran_past()  # from here on the device is ahead of the reader
        for step, following in enumerate(run_ahead(launch, self._ring.take, num_tokens)):
            if step == 0:
                require_tokens(following)
            else:
                self._transcript.write(torch.tensor(tokens)[:, None], self._transcript.length)
            tokens = following
            yield tokens
        self._transcript.caught_up()

    def close(self) -> None:
        """See `protocol.Decoder`; afterwards there is room for no prompt."""
        self._graphs.clear()
        self._cache, self.capacity = None, 0
        self._logits = self._step_logits = torch.empty(0)
        self._transcript.forget()

    def _require_open(self) -> None:
        if not self.capacity:
            raise ValueError("the decoder is closed")

    def _forget_from(self, start: int) -> None:
        if self.can_rewind:
            rewind(self._cache, start)
        elif start == 0:
            self._cache.reset()

    def _choose_first(self, sampling: Sampling) -> None:
        """The token after the prompt, from the logits that prefill left."""
        tokens = choose_tokens(self._logits, sampling, self._generator)
        self._input_ids.copy_(tokens[:, None])
        self._position.fill_(self._transcript.length)
        self._ring.restart()
        self._ring.write(mark_nan(tokens, self._logits))

    def _choose(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """The next tokens int64 (batch,), within a step."""
        return choose_tokens(logits, sampling, self._generator)

    def _step(self, sampling: Sampling) -> None:
        """One token on, on the device alone: what a graph holds."""
        self._step_logits = self._network.logits(self._input_ids, self._position, self._cache)
        tokens = self._choose(self._step_logits, sampling)
        self._input_ids.copy_(tokens[:, None])
        self._position.add_(1)
        self._ring.write(tokens)

    # -- making graphs ----------------------------------------------------------------------------

    @torch.inference_mode()
    def _graph_for(self, sampling: Sampling) -> Callable[[], None]:
        """The graph for this way of choosing; the seed is not a part of it.

        Recording runs nothing, so that the cache stays as it is.
        """
        key = replace(sampling, seed=None)
        if key not in self._graphs:
            self._record(key, warm_up=lambda: choose_tokens(self._logits, key, self._generator))
        return self._graphs[key]

    def _record(self, sampling: Sampling, *, warm_up: Callable[[], Any]) -> Callable[[], None]:
        self._graphs[sampling] = self._capture(
            lambda: self._step(sampling), warm_up=warm_up, generator=self._generator
        )
        return self._graphs[sampling]

    @torch.inference_mode()
    def _check_graph(self) -> None:
        """Record the greedy step and see that it gives what running it operation by operation does.

        Leaves the cache empty.
        """
        try:
            expected = self._logits_of(lambda: self._step(GREEDY))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may not know what to do with such a cache
            raise CaptureFailed(first_line(error)) from error
        found = self._logits_of(self._record(GREEDY, warm_up=lambda: self._step(GREEDY)))
        self._forget_from(0)
        for step, (wanted, given) in enumerate(zip(expected, found, strict=True)):
            # not <=: a NaN is a difference too
            if not (given - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                raise CaptureFailed(f"its recorded step gives other logits at token {step + 1}")

    def _logits_of(self, step: Callable[[], None]) -> list[Tensor]:
        """Logits float32 (batch, vocabulary) after tokens 0 1, 0 1 2, ...: attention over equal
        tokens would not show where they stand."""
        self._forget_from(0)
        self._input_ids.zero_()
        self._network.prefill(self._input_ids, 0, self._cache, in_chunks=False)
        self._position.fill_(1)
        logits = []
        for token_id in range(1, NUM_COMPARED + 1):
            self._input_ids.fill_(token_id)
            step()
            logits.append(self._step_logits.float().clone())
        return logits
