"""How threads share out a step: every item once, none before what it depends on."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from qtool.backends import cpu_threads
from qtool.backends.cpu_threads import begin_step, help_with_steps, operator, run_step
from qtool.backends.cpu_vectors import array_at

ITEMS = (1, 7, 0, 4, 1, 30)
FOLLOWS = (True, True, True, False, True, True)  # the fourth goes beside the second


@operator
def count(control, record, item, scratch):
    """record: items that must be done before, where this task's own counts begin, all counts."""
    fields = array_at(record, np.int64)
    counts, done = array_at(fields[np.uint64(2)], np.int64), np.int64(0)
    for i in range(fields[np.uint64(0)]):
        done += counts[np.uint64(i)] == array_at(control, np.int64)[np.uint64(cpu_threads.STEP)]
    # Anything else than the number of the step shows that something was missing.
    complete = done == fields[np.uint64(0)]
    counts[np.uint64(fields[np.uint64(1)] + item)] += 1 if complete else 1000


class Steps:
    """Tasks that count, and what they counted."""

    def __init__(self):
        self.control = np.zeros(cpu_threads.CONTROL_SIZE, np.int64)
        self.counts = np.zeros(sum(ITEMS), np.int64)
        self.records = np.zeros((len(ITEMS), 3), np.int64)
        self.table = np.zeros((len(ITEMS) + 1, cpu_threads.TASK_FIELDS), np.int64)
        first = depends = 0
        for row, record, num, follows in zip(
            self.table, self.records, ITEMS, FOLLOWS, strict=False
        ):
            depends = first if follows else depends
            record[:] = depends, first, self.counts.ctypes.data
            row[:] = first, depends, count.address, record.ctypes.data
            first += num
        self.table[-1, cpu_threads.FIRST] = first
        self.control[cpu_threads.TASKS] = self.table.ctypes.data

    def run(self):
        """How many helpers there were."""
        found = begin_step(self.control.ctypes.data, sum(ITEMS))
        run_step(self.control.ctypes.data, 0)
        return found

    def help(self):
        help_with_steps(self.control.ctypes.data, 0)


def test_the_caller_does_all_alone():
    steps = Steps()
    for number in range(1, 4):
        assert steps.run() == 0
        assert steps.counts.tolist() == [number] * sum(ITEMS)


@pytest.mark.parametrize("num_helpers", [1, 3])
def test_helpers_join_and_leave(num_helpers):
    """As often as they leave: nothing is done twice, left out or done too early."""
    steps = Steps()
    most, number = 0, 0
    for turn in range(200):
        helpers = [threading.Thread(target=steps.help) for _ in range(num_helpers)]
        for helper in helpers:
            helper.start()
        # On a busy machine a helper may come and go before the first step, or after the last.
        while not steps.control[cpu_threads.HELPERS] and any(it.is_alive() for it in helpers):
            time.sleep(0)
        for _ in range(200):
            most = max(most, steps.run())
            number += 1
            assert steps.counts.tolist() == [number] * sum(ITEMS)
        for helper in helpers:
            helper.join(timeout=60)
            assert not helper.is_alive()
        assert steps.control[cpu_threads.HELPERS] == 0
        if turn >= 5 and most:
            break
    assert 0 < most <= num_helpers


def test_a_ticket_of_an_earlier_step_is_not_taken():
    steps = Steps()
    steps.run()
    # A helper that looks now finds neither work nor a step that is its own.
    begin_step(steps.control.ctypes.data, 0)
    before = steps.counts.copy()
    steps.help()
    assert np.array_equal(steps.counts, before)
