"""Tokens from the device to the host while the device goes on making more.

A graph writes each step's tokens into the next row of a ring on the device. The host has each row
copied behind an event and waits for that event alone, some steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

# Steps that are queued before the host looks at the first: enough to hide its work between two
# tokens, few enough that little is made in vain when a text ends.
STEPS_AHEAD: Final = 8
# Before the first token, which nothing hides behind: one for the device to go on with.
FIRST_STEPS_AHEAD: Final = 2


class TokenRing:
    """int64 (STEPS_AHEAD, batch) on the device and in pinned host memory."""

    def __init__(self, batch: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._rows = torch.zeros(STEPS_AHEAD, batch, dtype=torch.int64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._host_rows = torch.zeros(
            STEPS_AHEAD, batch, dtype=torch.int64, device="cpu", pin_memory=on_gpu
        )
        self._arrived: list[Any] = []  # CUDA events, one per row
        if on_gpu:
            self._arrived = [torch.cuda.Event() for _ in range(STEPS_AHEAD)]  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        """The next write goes to row 0. Queued on the current stream."""
        self._next.zero_()

    def write(self, tokens: Tensor) -> None:
        """Put int64 (batch,) into the next row: device work only, a graph can hold it."""
        self._rows.index_copy_(0, self._next, tokens[None])
        self._next.add_(1).remainder_(STEPS_AHEAD)

    def send(self, step: int) -> None:
        """Queue the copy of what the `step`-th write put there."""
        row = step % STEPS_AHEAD
        self._host_rows[row].copy_(self._rows[row], non_blocking=True)
        if self._arrived:
            self._arrived[row].record()

    def take(self, step: int) -> list[int]:
        """The tokens of a step that was sent, once they are there."""
        row = step % STEPS_AHEAD
        if self._arrived:
            self._arrived[row].synchronize()
        tokens: list[int] = self._host_rows[row].tolist()
        return tokens


def run_ahead(
    launch: Callable[[int], None], take: Callable[[int], list[int]], num_steps: int
) -> Iterator[list[int]]:
    """Steps 0, 1, ... in order, at most STEPS_AHEAD of them launched and not yet taken."""
    launched = 0
    for step in range(num_steps):
        num_ahead = STEPS_AHEAD if step else FIRST_STEPS_AHEAD
        while launched < min(step + num_ahead, num_steps):
            launch(launched)
            launched += 1
        yield take(step)
