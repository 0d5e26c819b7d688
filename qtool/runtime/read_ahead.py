"""Tensors brought from files to one device before the loader asks for them.

    with ReadAhead(parts, fill, device=device) as ahead:
        data = ahead.take(parts[0])  # uint8 (num_bytes,) on `device`

Several threads read pieces of some MiB. For a GPU each reads into two pinned buffers in turn, so
that a piece is read while the one before travels; for host memory it reads straight into the
tensor. Each tensor has memory of its own, so nothing outlives the tensor that it was read for.

Reading begins with the first `take`: transformers reserves the device memory of the whole model
just before, and what was allocated earlier would come on top of that.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.checkpoint.records import TensorInfo
from qtool.events import Advanced, OnEvent, ignore_events

# One thread copies 5 to 8 GB/s out of the page cache, PCIe 5 takes 50 GB/s.
MAX_THREADS: Final = 8
# Large enough that the work in Python per piece does not count, a multiple of every element size.
PIECE_BYTES: Final = 8 << 20
BUFFERS_PER_THREAD: Final = 2
# What may lie ready before it is asked for. Tensors that are loaded as they are stored take no more
# memory for being early; those that the loader converts do, until they are converted.
AHEAD_BYTES: Final = 1 << 30

ByteArray = NDArray[np.uint8]
Verify = Callable[[ByteArray], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor to be read; `verify` raises if some of its bytes must not be loaded."""

    tensor: TensorInfo
    verify: Verify | None = None


Fill = Callable[[Part, int, ByteArray], None]


class ReadAhead:
    """Reads `parts` in their order; a part that is asked for out of turn goes first.

    `take` may be called from several threads. Leaving the context ends the reading, whatever is
    left.

    Args:
        parts: each to be taken at most once.
        fill: fills an array with the bytes of a part from an offset on, and verifies them.
        device: where the tensors go.
        on_event: gets Advanced records, from the threads that call `take`.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        fill: Fill,
        *,
        device: torch.device,
        on_event: OnEvent = ignore_events,
    ) -> None:
        self._fill = fill
        self._on_event = on_event
        self._target = _GpuTarget(device) if device.type == "cuda" else _HostTarget()
        self._pending = {part.tensor.name: _Pending(part) for part in parts}
        self._queue = deque(self._pending.values())
        self._urgent: deque[_Pending] = deque()
        self._ahead_bytes = 0  # begun or read, and not asked for
        self._advanced: list[Advanced] = []
        self._begun = self._ended = False
        self._error: BaseException | None = None
        lock = threading.Lock()
        self._may_read = threading.Condition(lock)  # reading threads wait for it
        self._has_read = threading.Condition(lock)  # those that take wait for it
        num_threads = _num_threads()
        self._threads = [
            threading.Thread(target=self._work, name=f"qtool-read-{i}", daemon=True)
            for i in range(num_threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(None)
        for thread in self._threads:
            thread.join()
        self._target.finish()

    def take(self, part: Part) -> Tensor:
        """The bytes of `part`, uint8 (num_bytes,); work on the current stream may use them.

        Raises:
            QtoolError: what `fill` raised, for this part or for one read ahead.
            CancelledError: the context was left meanwhile.
        """
        with self._may_read:
            pending = self._pending.pop(part.tensor.name)
            self._ask_for(pending)
        while True:
            with self._has_read:
                advanced, self._advanced = self._advanced, []
                done = pending.data is not None and pending.unread_bytes == 0
                if not (advanced or done):
                    if self._ended:
                        raise self._error or CancelledError(f"{part.tensor.name} is not read")
                    self._has_read.wait()
            for event in advanced:
                self._on_event(event)
            if done:
                assert pending.data is not None
                self._target.hand_over()
                return pending.data

    def _ask_for(self, pending: _Pending) -> None:
        self._begun = pending.is_wanted = True
        if pending.data is not None:
            self._ahead_bytes -= pending.num_bytes
        if pending in self._queue:
            self._queue.remove(pending)
            self._urgent.append(pending)
        self._may_read.notify()

    def _work(self) -> None:
        try:
            with self._target.thread_context():
                carry = self._target.carrier()
                while (piece := self._next_piece()) is not None:
                    carry(piece, self._fill)
                    self._note_read(piece)
        except BaseException as error:  # raised again where the tensor is asked for
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._may_read:
            self._error = self._error or error
            self._ended = True
            self._may_read.notify_all()
            self._has_read.notify_all()

    def _next_piece(self) -> _Piece | None:
        """The next piece to read; waits for one, and returns None at the end."""
        with self._may_read:
            while not self._ended:
                queue = self._urgent or self._queue
                if queue and self._may_begin(queue[0]):
                    piece = self._cut(queue)
                    self._may_read.notify()  # there may be one for another thread
                    return piece
                self._may_read.wait()
            return None

    def _may_begin(self, pending: _Pending) -> bool:
        if pending.is_wanted or pending.data is not None:
            return True
        return self._begun and self._ahead_bytes + pending.num_bytes <= AHEAD_BYTES

    def _cut(self, queue: deque[_Pending]) -> _Piece:
        """The next piece of the queue's first tensor, which leaves the queue with its last."""
        pending = queue[0]
        if pending.data is None:
            pending.data = self._target.allocate(pending.num_bytes)
            if not pending.is_wanted:
                self._ahead_bytes += pending.num_bytes
        start = pending.cut_bytes
        pending.cut_bytes = min(start + PIECE_BYTES, pending.num_bytes)
        if pending.cut_bytes == pending.num_bytes:
            queue.popleft()
        return _Piece(pending, start, pending.data[start : pending.cut_bytes])

    def _note_read(self, piece: _Piece) -> None:
        with self._has_read:
            piece.pending.unread_bytes -= piece.data.numel()
            self._advanced.append(Advanced(piece.data.numel(), piece.pending.part.tensor.name))
            self._has_read.notify_all()


def pin_buffers() -> None:
    """Have the buffers that reading into a GPU will ask for; PyTorch keeps them when they go."""
    buffers = [_PinnedBuffer() for _ in range(_num_threads() * BUFFERS_PER_THREAD)]
    del buffers


def _num_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


class _Pending:
    """A part on its way: `data` is its memory once reading began."""

    __slots__ = ("cut_bytes", "data", "is_wanted", "num_bytes", "part", "unread_bytes")

    def __init__(self, part: Part) -> None:
        self.part = part
        self.num_bytes = self.unread_bytes = part.tensor.num_bytes
        self.cut_bytes = 0  # given to threads
        self.is_wanted = False
        self.data: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a part from `start` on, and where they go: `data` uint8 (num_bytes,)."""

    pending: _Pending
    start: int
    data: Tensor


Carry = Callable[[_Piece, Fill], None]


class _Target(Protocol):
    """Memory to read into."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory for one tensor, uint8 (num_bytes,)."""
        ...

    def thread_context(self) -> AbstractContextManager[Any]:
        """What a reading thread runs in."""
        ...

    def carrier(self) -> Carry:
        """What brings pieces there, for one thread."""
        ...

    def hand_over(self) -> None:
        """The caller's current stream waits for all that was carried."""
        ...

    def finish(self) -> None:
        """All that was carried is there."""
        ...


class _HostTarget:
    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def thread_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def carrier(self) -> Carry:
        return lambda piece, fill: fill(piece.pending.part, piece.start, piece.data.numpy())

    def hand_over(self) -> None:
        pass

    def finish(self) -> None:
        pass


class _GpuTarget:
    """One stream carries all copies: a GPU has one engine for that direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loader = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, num_bytes: int) -> Tensor:
        with torch.cuda.stream(self._loader):  # the memory belongs to the stream that will use it
            data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # It may have been freed by work of the loader that is not done yet.
        self._stream.wait_stream(self._loader)
        return data

    def thread_context(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device)

    def carrier(self) -> Carry:
        turns = cycle([_PinnedBuffer() for _ in range(BUFFERS_PER_THREAD)])

        def carry(piece: _Piece, fill: Fill) -> None:
            buffer = next(turns)
            buffer.is_free.synchronize()
            source = buffer.data[: piece.data.numel()]
            fill(piece.pending.part, piece.start, source.numpy())
            with torch.cuda.stream(self._stream):
                piece.data.copy_(source, non_blocking=True)
                buffer.is_free.record(self._stream)

        return carry

    def hand_over(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()


class _PinnedBuffer:
    """Host memory that the GPU reads by itself: `is_free` comes once it has."""

    def __init__(self) -> None:
        self.data = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.is_free = torch.cuda.Event()  # type: ignore[no-untyped-call]
