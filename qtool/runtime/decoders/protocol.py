"""What every decoder does: it owns a KV cache, fills it from a prompt and makes tokens from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Path = Literal["fused", "graph", "eager"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most likely one.

    `top_p` and `top_k` narrow the choice when temperature is above 0; None leaves all tokens.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


class Decoder(Protocol):
    """A model with a cache for `batch` sequences of up to `capacity` tokens each.

    Attributes:
        path: the way the model runs.
        path_reason: why, in a few words for people.
        capacity: tokens that the cache holds per sequence.
        can_rewind: whether `prefill` may start within what the cache already holds; where it is
            False (recurrent states, sliding windows) only 0 or the exact end will do.
    """

    path: Path
    path_reason: str
    capacity: int
    can_rewind: bool

    def prefill(self, input_ids: Tensor, start: int) -> None:
        """Put tokens at positions start, start + 1, ... and get ready to make the next one.

        What the cache held from `start` on is forgotten. Long prompts go through in chunks, so
        that activations stay bounded.

        Args:
            input_ids: int64 (batch, num_tokens), num_tokens >= 1, on any device.

        Raises:
            QtoolError: usage, if start + num_tokens > capacity.
        """
        ...

    def decode(self, sampling: Sampling, num_tokens: int) -> Iterator[list[int]]:
        """Make up to `num_tokens` tokens after `prefill`, one list of `batch` ids at a time.

        The device may run ahead of the reader; closing the iterator ends that. The tokens that
        were yielded, all but the last, are in the cache afterwards; what lies behind them counts
        as forgotten.

        Raises:
            QtoolError: bad_file, if the logits after the prompt are no numbers.
        """
        ...

    def close(self) -> None:
        """Give the cache's memory back."""
        ...
