"""Who is measured when."""

from __future__ import annotations

from collections import Counter

import pytest

from qtool.bench import contenders
from qtool.bench.contenders import NUM_WARM_UPS, Contender, Measured, Sample, measure
from qtool.bench.records import Moved
from qtool.events import Advanced, Note, Started

MOVED = Moved(60, 40)


class CountingClock:
    """Says how many runs were timed so far instead of how long they took."""

    runs_per_sample = 4

    def __init__(self):
        self.firsts = []

    def time(self, run, first):
        self.firsts.append(first)
        run(first)
        return Sample(float(len(self.firsts)))


def take(repeats, events=None):
    clock, calls = CountingClock(), []
    contenders = [
        Contender(name, "qtool", MOVED, lambda i, name=name: calls.append((name, i)))
        for name in "abc"
    ]
    on_event = (lambda event: None) if events is None else events.append
    return measure(contenders, clock, repeats, "stage", on_event), clock, calls


def test_everybody_has_one_turn_a_round_in_a_changing_order():
    measured, clock, calls = take(30)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 30 + NUM_WARM_UPS
    orders = Counter("".join(name for name, _ in each) for each in rounds)
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(orders) > 1
    assert [m.op for m in measured] == ["a", "b", "c"]
    # The next samples go on with the next buffer sets.
    assert clock.firsts[::3] == [4 * number for number in range(len(rounds))]


def test_warm_ups_do_not_count():
    measured, _, _ = take(20)
    assert all(len(m.samples) == 20 for m in measured)
    assert min(min(m.seconds) for m in measured) > 3 * NUM_WARM_UPS


def test_progress_adds_up():
    events = []
    take(5, events)
    (started,) = (event for event in events if isinstance(event, Started))
    advanced = sum(event.num_bytes for event in events if isinstance(event, Advanced))
    assert advanced == started.total_bytes == 3 * (5 + NUM_WARM_UPS) * 4 * 100


def test_a_kernel_as_quick_as_its_launch_is_told():
    slow, quick, waiting = (
        Measured("op", "qtool", MOVED, (Sample(run, launch), Sample(1.1 * run, launch)))
        for run, launch in ((100e-6, 50e-6), (100e-6, 95e-6), (2e-3, 1.9e-3))
    )
    assert quick.is_host_bound and not slow.is_host_bound
    assert not waiting.is_host_bound, "a launch that takes milliseconds has waited for the device"


@pytest.mark.parametrize(
    ("round_s", "notes"), [(0.1, []), (2.5, [Note("20 rounds come, about 50 s")])]
)
def test_long_measurements_say_how_long_they_take(monkeypatch, round_s, notes):
    class Time:
        now_s = 0.0

        def perf_counter(self):
            return Time.now_s

    class SlowClock(CountingClock):
        def time(self, run, first):
            Time.now_s += 9.0 if first == 0 else round_s  # the first round loads and compiles
            return super().time(run, first)

    monkeypatch.setattr(contenders, "time", Time())
    contender = Contender("a", "qtool", MOVED, lambda i: None)
    events = []
    measure([contender], SlowClock(), 20, "stage", events.append)
    assert [event for event in events if isinstance(event, Note)] == notes
