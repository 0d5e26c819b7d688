"""Who generates: qtool's decoders and transformers' `generate`, timed the same way.

Both start from a prompt (batch, num_tokens) of random ids, and the first new token ends prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.bench.generate_records import Timing
from qtool.bench.records import Engine
from qtool.errors import QtoolError
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.loading import LoadedModel
from qtool.runtime.quiet import quiet_transformers


class GenerateEngine(Protocol):
    """A model that is ready for prompts of one size.

    Attributes:
        name: who it is.
        path: the way qtool runs the model; None for others.
        path_reason: why.
    """

    name: Engine
    path: str | None
    path_reason: str | None

    def run(self, input_ids: Tensor, new_tokens: int) -> Timing:
        """Continue `input_ids`, int64 (batch, num_tokens), by `new_tokens` tokens each, at least 2.

        Greedy; no token ends a text.
        """
        ...

    def close(self) -> None:
        """Give back all but the weights."""
        ...


class QtoolEngine:
    """See `GenerateEngine`: a decoder with room for one prompt and its answer, used again."""

    name: Engine = "qtool"

    def __init__(
        self, loaded: LoadedModel, *, capacity: int, batch: int, options: DecoderOptions
    ) -> None:
        self._decoder = choose_decoder(loaded, capacity, batch, options=options)
        self.path: str | None = self._decoder.path
        self.path_reason: str | None = self._decoder.path_reason

    def run(
        self, input_ids: Tensor, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Timing:
        """See `GenerateEngine.run`; `on_token` is called for each, in runs that do not count."""
        start_s = time.perf_counter()
        self._decoder.prefill(input_ids, 0)
        tokens = self._decoder.decode(Sampling(), new_tokens)
        next(tokens)
        first_s = time.perf_counter()
        made = 1 + sum(1 for _ in (tokens if on_token is None else _telling(tokens, on_token)))
        end_s = time.perf_counter()
        if made != new_tokens:
            raise QtoolError(
                f"the {self.path} decoder made {made} tokens of {new_tokens}",
                kind="internal",
                hint="this is a bug in qtool, so nothing was measured; please report it",
            )
        return Timing(first_s - start_s, end_s - first_s)

    def close(self) -> None:
        """See `GenerateEngine.close`."""
        self._decoder.close()


def _telling(tokens: Iterator[Any], on_token: Callable[[], None]) -> Iterator[Any]:
    """The tokens; all but the first, which is there by now, are told when they come."""
    on_token()
    for token in tokens:
        on_token()
        yield token


class TransformersEngine:
    """See `GenerateEngine`: `generate` as its users call it, with the cache that it makes itself.

    A run is two calls, for one token and for all of them; what the second takes longer is decoding.
    """

    path: str | None = None
    path_reason: str | None = None

    def __init__(self, name: Engine, network: Any) -> None:
        self.name = name
        self._network = network

    def run(self, input_ids: Tensor, new_tokens: int) -> Timing:
        """See `GenerateEngine.run`."""
        with quiet_transformers(), quiet_bitsandbytes():
            prefill_s = self._time_generate(input_ids, 1)
            whole_s = self._time_generate(input_ids, new_tokens)
        return Timing(prefill_s, whole_s - prefill_s)

    def close(self) -> None:
        """See `GenerateEngine.close`; its cache ends with each call."""

    def _time_generate(self, input_ids: Tensor, new_tokens: int) -> float:
        start_s = time.perf_counter()
        output = self._network.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        output.cpu()
        assert output.shape[1] == input_ids.shape[1] + new_tokens
        return time.perf_counter() - start_s
