"""Engines take turns: who takes part, and how their samples are collected."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from qtool.bench.duration import announce
from qtool.bench.records import Engine, Moved
from qtool.errors import Option, QtoolError
from qtool.events import Advanced, Finished, OnEvent, Started

NUM_WARM_UPS: Final = 2
MIN_REPEATS: Final = 20
HOST_BOUND_SHARE: Final = 0.8  # of a launch's time: then the device has next to nothing queued
LONGEST_LAUNCH_S: Final = 0.2e-3

Run = Callable[[int], object]  # do it once, with buffer set i modulo their number


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine at one operation; `moved` by each run."""

    op: str
    engine: Engine
    moved: Moved
    run: Run


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one run on the device, and seconds that the host needed to launch it."""

    seconds: float
    launch_seconds: float = 0.0


class Clock(Protocol):
    """How a device is timed: one sample is the mean of `runs_per_sample` runs."""

    runs_per_sample: int

    def time(self, run: Run, first: int) -> Sample:
        """Time `run` on buffer sets `first` and following."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender's samples, without the weights that its `run` holds on to."""

    op: str
    engine: Engine
    moved: Moved
    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each sample."""
        return tuple(sample.seconds for sample in self.samples)

    @property
    def is_host_bound(self) -> bool:
        """Whether launching took about as long as running: then it is no figure of the kernel.

        Where both are long, it is the launch that waited for the kernel.
        """
        launch = statistics.median(sample.launch_seconds for sample in self.samples)
        run = statistics.median(self.seconds)
        return launch > HOST_BOUND_SHARE * run and run < LONGEST_LAUNCH_S


def check_repeats(repeats: int) -> None:
    """QtoolError (usage) for too few samples."""
    if repeats < MIN_REPEATS:
        raise QtoolError(
            (Option("repeat", repeats), f": a median of fewer than {MIN_REPEATS} says too little"),
            kind="usage",
            hint=(Option("repeat", MIN_REPEATS), " or more"),
        )


def measure(
    contenders: Sequence[Contender], clock: Clock, repeats: int, stage: str, on_event: OnEvent
) -> list[Measured]:
    """Take `repeats` samples of each, in turns; the order changes from turn to turn."""
    rounds = NUM_WARM_UPS + repeats
    round_bytes = clock.runs_per_sample * sum(contender.moved.num_bytes for contender in contenders)
    on_event(Started(stage, rounds * round_bytes, is_transfer=False))
    samples: list[list[Sample]] = [[] for _ in contenders]
    for number in range(rounds):
        start_s = time.perf_counter()
        for index in random.sample(range(len(contenders)), len(contenders)):
            contender = contenders[index]
            sample = clock.time(contender.run, number * clock.runs_per_sample)
            if number >= NUM_WARM_UPS:
                samples[index].append(sample)
            item = f"{contender.op} ({contender.engine})"
            on_event(Advanced(clock.runs_per_sample * contender.moved.num_bytes, item))
        if number == NUM_WARM_UPS - 1:
            announce(f"{repeats} rounds", repeats * (time.perf_counter() - start_s), on_event)
    on_event(Finished(stage))
    return [
        Measured(contender.op, contender.engine, contender.moved, tuple(taken))
        for contender, taken in zip(contenders, samples, strict=True)
    ]
