"""The copy that is the limit, and the clock around it."""

from __future__ import annotations

import torch

from qtool.bench.contenders import Sample
from qtool.bench.torch_device import COPY_REPEATS, copy_contender, make_clock, measure_copy
from qtool.events import Advanced, Started
from tests.bench.tiny_shape import COPY_BYTES, shrink_sizes

CPU = torch.device("cpu")


def test_copies_go_from_pair_to_pair_and_are_counted_twice(monkeypatch):
    shrink_sizes(monkeypatch)
    contender = copy_contender(CPU)
    assert contender.moved.num_bytes == 2 * COPY_BYTES
    copied = [contender.run(i) for i in range(3)]
    assert copied[0] is copied[2] and not torch.equal(copied[0], copied[1])
    assert copied[0].count_nonzero() > 0.99 * copied[0].numel()


def test_the_limit_is_the_bytes_over_the_median(monkeypatch):
    shrink_sizes(monkeypatch)
    clock = make_clock(CPU, 8)
    samples = iter([1.0, 1.0, *(0.5 if i else 9.0 for i in range(COPY_REPEATS))])
    monkeypatch.setattr(type(clock), "time", lambda self, run, first: Sample(next(samples)))
    events = []
    limit = measure_copy(CPU, events.append)
    assert limit.bytes == 2 * COPY_BYTES and limit.bytes_per_s == 4 * COPY_BYTES
    (started,) = (event for event in events if isinstance(event, Started))
    assert started.total_bytes == sum(e.num_bytes for e in events if isinstance(e, Advanced))
