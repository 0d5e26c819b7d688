"""Reading ahead in host memory: every byte, any order, bounded, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from qtool.checkpoint.records import TensorInfo
from qtool.events import Advanced, Event
from qtool.runtime import read_ahead
from qtool.runtime.read_ahead import ByteArray, Part, ReadAhead

CPU = torch.device("cpu")
PIECE = 64
SIZES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 3, 20, 0, 2 * PIECE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", PIECE)


class FakeFile:
    """Bytes that tensors of the given sizes lie in, one after the other."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
        self.num_read = 0
        self._lock = threading.Lock()
        offsets = np.cumsum((0, *sizes))
        self.parts = [
            Part(TensorInfo(f"t{i}", "U8", (size,), "file", int(offset)))
            for i, (size, offset) in enumerate(zip(sizes, offsets, strict=False))
        ]

    def fill(self, part: Part, start: int, buffer: ByteArray) -> None:
        begin = part.tensor.offset + start
        buffer[:] = self.data[begin : begin + buffer.size]
        with self._lock:
            self.num_read += buffer.size

    def expected(self, part: Part) -> ByteArray:
        offset = part.tensor.offset
        return self.data[offset : offset + part.tensor.num_bytes]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("order", ["as planned", "reversed", "shuffled"])
def test_every_tensor_arrives_in_whatever_order_it_is_asked_for(order: str) -> None:
    file = FakeFile(SIZES)
    asked = list(file.parts)
    if order == "reversed":
        asked.reverse()
    elif order == "shuffled":
        np.random.default_rng(1).shuffle(asked)  # type: ignore[arg-type]
    with ReadAhead(file.parts, file.fill, device=CPU) as ahead:
        for part in asked:
            assert np.array_equal(ahead.take(part).numpy(), file.expected(part))
    assert file.num_read == sum(SIZES)


def test_several_threads_may_ask() -> None:
    file = FakeFile(SIZES * 20)
    found: dict[str, torch.Tensor] = {}

    def take(parts: list[Part]) -> None:
        for part in parts:
            found[part.tensor.name] = ahead.take(part)

    with ReadAhead(file.parts, file.fill, device=CPU) as ahead:
        threads = [threading.Thread(target=take, args=(file.parts[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for part in file.parts:
        assert np.array_equal(found[part.tensor.name].numpy(), file.expected(part))


def test_nothing_is_read_before_the_first_is_asked_for() -> None:
    file = FakeFile(SIZES)
    with ReadAhead(file.parts, file.fill, device=CPU):
        time.sleep(0.05)
    assert file.num_read == 0


def test_what_lies_ready_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 10 * PIECE)
    file = FakeFile((PIECE,) * 40)
    with ReadAhead(file.parts, file.fill, device=CPU) as ahead:
        for num_taken in range(1, 30):
            ahead.take(file.parts[num_taken - 1])
            wait_until(lambda n=num_taken: file.num_read >= (n + 10) * PIECE)  # type: ignore[misc]
            time.sleep(0.001)
            assert file.num_read == (num_taken + 10) * PIECE


def test_a_tensor_above_the_bound_is_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 2 * PIECE)
    file = FakeFile((8, 9 * PIECE, 8))
    with ReadAhead(file.parts, file.fill, device=CPU) as ahead:
        for part in file.parts:
            assert np.array_equal(ahead.take(part).numpy(), file.expected(part))


def test_progress_adds_up_and_comes_from_who_asks() -> None:
    file = FakeFile(SIZES)
    events: list[Event] = []

    def on_event(event: Event) -> None:
        assert threading.current_thread() is threading.main_thread()
        events.append(event)

    with ReadAhead(file.parts, file.fill, device=CPU, on_event=on_event) as ahead:
        for part in file.parts:
            ahead.take(part)
    advanced = [event for event in events if isinstance(event, Advanced)]
    assert sum(event.num_bytes for event in advanced) == sum(SIZES)


def test_an_error_is_raised_where_a_tensor_is_asked_for() -> None:
    file = FakeFile((PIECE,) * 8)

    def fill(part: Part, start: int, buffer: ByteArray) -> None:
        if part.tensor.name == "t5":
            raise OSError("bad sector")
        file.fill(part, start, buffer)

    with ReadAhead(file.parts, fill, device=CPU) as ahead, pytest.raises(OSError, match="sector"):
        for part in file.parts:
            ahead.take(part)


def test_leaving_ends_the_wait_of_other_threads() -> None:
    file = FakeFile((PIECE,))
    may_fill, caught = threading.Event(), []

    def fill(part: Part, start: int, buffer: ByteArray) -> None:
        may_fill.wait(10)
        raise AssertionError

    def take() -> None:
        try:
            ahead.take(file.parts[0])
        except (CancelledError, AssertionError) as error:
            caught.append(error)

    with ReadAhead(file.parts, fill, device=CPU) as ahead:
        thread = threading.Thread(target=take)
        thread.start()
        wait_until(lambda: bool(ahead._begun))
        threading.Timer(0.05, may_fill.set).start()
    thread.join(10)
    assert len(caught) == 1
