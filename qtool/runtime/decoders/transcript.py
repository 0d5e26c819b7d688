"""The tokens that a decoder's cache holds, kept on the host.

Recurrent states and sliding windows cannot go back. When they have to, because a run was broken
off or the device ran ahead of the reader, their cache is made again from these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Transcript:
    """The first `length` tokens of `batch` sequences, for a cache of `capacity` tokens each."""

    def __init__(self, batch: int, capacity: int) -> None:
        self._ids = np.empty((batch, 0), np.int64)  # grows: few texts fill a cache
        self._capacity = capacity
        self.length = 0
        self._is_in_step = True  # whether the cache holds these tokens and no others

    @property
    def num_free(self) -> int:
        """Tokens that the cache can still take."""
        return self._capacity - self.length

    def is_exactly(self, length: int) -> bool:
        """Whether the cache stands right behind `length` tokens."""
        return self._is_in_step and length == self.length

    def whole(self, input_ids: Tensor, start: int) -> Tensor:
        """The tokens before `start` and then `input_ids`, on the host."""
        return torch.from_numpy(np.hstack([self._ids[:, :start], input_ids.cpu().numpy()]))

    @contextmanager
    def taking(self, input_ids: Tensor, start: int) -> Iterator[None]:
        """While the cache takes `input_ids` up from `start` on; it may break off at any time."""
        self._is_in_step = False
        input_ids = input_ids.cpu()  # now: behind queued work the host would wait for all of it
        yield
        self.write(input_ids, start)
        self._is_in_step = True

    def write(self, input_ids: Tensor, start: int) -> None:
        """`input_ids`, on the host, are what comes from `start` on."""
        self.length = start + input_ids.shape[1]
        batch, room = self._ids.shape
        if self.length > room:
            larger = np.empty((batch, max(self.length, 2 * room)), np.int64)
            larger[:, :start] = self._ids[:, :start]
            self._ids = larger
        self._ids[:, start : self.length] = input_ids.numpy()

    def ran_past(self) -> None:
        """The cache may hold more than these tokens."""
        self._is_in_step = False

    def caught_up(self) -> None:
        """It does not: the last that was made was also written here."""
        self._is_in_step = True

    def forget(self) -> None:
        """The cache is empty."""
        self.length, self._is_in_step = 0, True
