"""Threads that carry the tiles of all shards in work.

    with open_workers(backend, plan.tensors, fmt, settings) as workers:
        with ShardPipeline(..., context=workers.context) as shard, workers.carrying(shard):
            file.wait_for(file.num_bytes)

A free worker takes the next tile itself, from each shard in its turn. So no thread stands between
workers and tiles, as many tiles are in flight as there are workers, and several files are written
at once, which a file system can do in parallel.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qtool.backends.protocol import Backend
from qtool.events import Advanced, Note, OnEvent, ignore_events
from qtool.formats.precisions import QuantFormat
from qtool.quantize.buffers import (
    BufferPool,
    BufferSizes,
    TileBuffers,
    collected_bytes,
    largest_sizes,
)
from qtool.quantize.pipeline import PipelineContext, PipelineSettings, ShardPipeline
from qtool.quantize.plan import TensorPlan
from qtool.quantize.tiles import Tile, whole_tile_bytes

# Shards that take turns. A file's checksum and its writes are sequential, so several files go
# faster than one; on a spinning disk one at a time would be better.
SHARDS_IN_TURN = 4
# Of absmax for double quantization. Only tensors of a gigabyte need so much that fewer take turns.
MAX_COLLECTED_BYTES = 256 << 20


@contextmanager
def open_workers(
    backend: Backend,
    tensors: Sequence[TensorPlan],
    fmt: QuantFormat,
    settings: PipelineSettings,
    on_event: OnEvent = ignore_events,
) -> Iterator[TileWorkers]:
    """Reserve from `backend` what the tiles of `tensors` need, and start the workers.

    Raises:
        QtoolError: memory, if the backend has not even room for the smallest tiles.
    """
    asked_bytes = settings.tile_bytes and whole_tile_bytes(settings.tile_bytes)
    reservation = backend.reserve(settings.num_workers, asked_bytes)
    try:
        for note in reservation.notes:
            on_event(Note(note, "warning"))
        context = PipelineContext(
            backend,
            fmt,
            tile_bytes=whole_tile_bytes(reservation.tile_bytes),
            allow_nonfinite=settings.allow_nonfinite,
            nonfinite_hint=settings.nonfinite_hint,
            pool=BufferPool(backend),
        )
        workers = TileWorkers(
            context,
            num_workers=reservation.num_workers,
            sizes=largest_sizes(tensors, fmt, context.tile_bytes),
            num_in_turn=shards_in_turn(tensors, fmt),
        )
        try:
            workers.start()
            yield workers
        finally:
            workers.close()
    finally:
        backend.release()


def shards_in_turn(tensors: Iterable[TensorPlan], fmt: QuantFormat) -> int:
    """How many shards take turns: each has up to two of `tensors` in work."""
    num_elements = [t.source.num_elements for t in tensors if t.action == "quantize"]
    if not fmt.double_quant or not any(num_elements):
        return SHARDS_IN_TURN
    largest_bytes = collected_bytes(-(-max(num_elements) // fmt.blocksize))
    return max(1, min(SHARDS_IN_TURN, MAX_COLLECTED_BYTES // (2 * largest_bytes)))


@dataclass(eq=False, slots=True)
class _Turn:
    """A shard in work: tiles that nobody took yet, and how many are not carried yet."""

    shard: ShardPipeline
    tiles: deque[Tile]
    num_left: int


class TileWorkers:
    """The workers of a run; made, started and stopped by `open_workers`."""

    def __init__(
        self, context: PipelineContext, *, num_workers: int, sizes: BufferSizes, num_in_turn: int
    ) -> None:
        self.context = context
        self._sizes = sizes
        self._num_in_turn = num_in_turn
        self._changed = threading.Condition()
        self._turns: deque[_Turn] = deque()  # those with tiles to take
        self._carried: set[_Turn] = set()
        self._stop_reason: BaseException | None = None
        self._done: deque[Tile] = deque()
        self._threads = [
            threading.Thread(target=self._work, name=f"tiles-{number}")
            for number in range(num_workers)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    @contextmanager
    def carrying(self, shard: ShardPipeline) -> Iterator[None]:
        """Carry the shard's tiles while the body waits for them in its output file.

        When the body fails, or its waiting because something else failed, all workers have stopped
        when this returns, so that the files they used can be closed.

        Raises:
            BaseException: the first error of any worker or body.
        """
        turn = self._begin(shard)
        try:
            yield
            self._wait_for(lambda: turn.num_left == 0)
        except BaseException as error:
            raise self.stop(error)  # noqa: B904 - it may have a cause of its own
        finally:
            with self._changed:
                self._carried.discard(turn)

    def stop(self, reason: BaseException) -> BaseException:
        """End every worker after the tile in its hands, and wait until all have ended.

        Returns the reason of the first who stopped them.
        """
        first_reason = self._begin_stop(reason)
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()
        return first_reason

    def close(self) -> None:
        """Stop, and let go of the error that there may have been and all that it refers to."""
        self.stop(CancelledError())
        self._stop_reason = CancelledError("the workers have ended")

    def report(self, on_event: OnEvent) -> None:
        """Tell what was done since the last report, tensor by tensor."""
        done_bytes: dict[str, int] = {}
        with suppress(IndexError):  # that is the end
            while True:
                tile = self._done.popleft()
                name = tile.tensor.source.name
                done_bytes[name] = done_bytes.get(name, 0) + tile.source_bytes
        for name, num_bytes in done_bytes.items():
            on_event(Advanced(num_bytes, name))

    # -- inside ---------------------------------------------------------------------------------

    def _begin(self, shard: ShardPipeline) -> _Turn:
        tiles = deque(shard.tiles())
        turn = _Turn(shard, tiles, len(tiles))
        with self._changed:
            self._wait_for(lambda: len(self._turns) < self._num_in_turn)
            self._turns.append(turn)
            self._carried.add(turn)
            self._changed.notify_all()
        return turn

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason is not None or condition())
            if self._stop_reason is not None:
                raise self._stop_reason

    def _work(self) -> None:
        try:
            buffers = TileBuffers.allocate(self.context.backend, self._sizes)
            while (taken := self._take_tile()) is not None:
                turn, tile = taken
                turn.shard.carry(tile, buffers)
                self._finish_tile(turn, tile)
        except BaseException as error:
            self._begin_stop(error)

    def _take_tile(self) -> tuple[_Turn, Tile] | None:
        """The next tile, once there is one; None when the workers are to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason is not None or self._turns)
            if self._stop_reason is not None:
                return None
            turn = self._turns.popleft()
            tile = turn.tiles.popleft()
            if turn.tiles:
                self._turns.append(turn)
            else:
                self._changed.notify_all()  # there is room for another shard
            return turn, tile

    def _finish_tile(self, turn: _Turn, tile: Tile) -> None:
        self._done.append(tile)
        with self._changed:
            turn.num_left -= 1
            if turn.num_left == 0:
                turn.shard.output.require_complete()
                self._changed.notify_all()

    def _begin_stop(self, reason: BaseException) -> BaseException:
        with self._changed:
            if self._stop_reason is None:
                self._stop_reason = reason
            for turn in self._carried:
                turn.shard.output.abandon()
            self._changed.notify_all()
            return self._stop_reason
