"""`qtool bench optimizers`: a step of each optimizer, beside a copy of what it reads and writes.

    result = bench_optimizers(OptimizerRequest(cases=("lora",)))

Every engine has parameters of its own, and all get the same random gradients. A sample is a whole
step as a program sees it: from the call of `step()` until the device is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from qtool.architecture import build_architecture
from qtool.backends.cpu import num_usable_cores
from qtool.bench.contenders import (
    MIN_REPEATS,
    NUM_WARM_UPS,
    Contender,
    Run,
    Sample,
    check_repeats,
    measure,
)
from qtool.bench.interruption import gather
from qtool.bench.machine import describe_host, device_name, software_versions
from qtool.bench.model_shapes import DEFAULT_SHAPE, MODEL_SHAPES
from qtool.bench.records import BenchResult, Engine, Limit, Moved, Row, make_row
from qtool.bench.torch_device import COPY, measure_copy
from qtool.errors import Option, QtoolError
from qtool.events import Note, OnEvent, ignore_events
from qtool.optim import AdamW8bit, Lion8bit, SGD8bit
from qtool.planner.lora import ALL_LINEAR, features, target_layers
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.memory import out_of_memory_as_error
from qtool.runtime.placement import resolve_device

Shapes = tuple[tuple[int, int], ...]
Parameters = list[nn.Parameter]
Make = Callable[[Parameters], Any]

CASES: Final = ("lora", "full")
LORA_RANK: Final = 16
FULL_SHAPES: Final[Shapes] = ((8192, 8192),) * 15
NUM_GRADIENTS: Final = 2  # sets of them, in turns: a step must not find the last one's in a cache
LEARNING_RATE: Final = 1e-4
MOMENTUM: Final = 0.9
DTYPE_WORDS: Final = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ENGINES: Final[tuple[Engine, ...]] = ("qtool", "torch", "bitsandbytes")  # as tables list them
PARAMETER_DEVIATION: Final = 0.02
GRADIENT_DEVIATION: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters of one dtype, for people `label`."""

    name: str
    label: str
    shapes: Shapes
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Of all tensors."""
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True, slots=True)
class OptimizerRequest:
    """What to measure; without `cases` both on a GPU, LoRA's alone on the CPU."""

    cases: tuple[str, ...] = ()
    device: str = "auto"
    repeats: int = MIN_REPEATS
    with_rivals: bool = True


@dataclass(frozen=True, slots=True)
class _Kind:
    """An algorithm of one engine."""

    op: str
    engine: Engine
    make: Make


def bench_optimizers(request: OptimizerRequest, on_event: OnEvent = ignore_events) -> BenchResult:
    """Measure.

    Raises:
        QtoolError: too few repeats, no such device, or too little memory.
    """
    check_repeats(request.repeats)
    device = resolve_device(request.device)
    on_gpu = device.type == "cuda"
    chosen = [make_case(name) for name in request.cases or (CASES if on_gpu else CASES[:1])]
    warnings: list[str] = []
    kinds = list(_kinds(with_rivals=request.with_rivals, warnings=warnings))
    labels = "; ".join(case.label for case in chosen)
    rounds = f"{NUM_WARM_UPS} rounds to warm up and {request.repeats} that count"
    on_event(Note(f"{labels} on {device}: {rounds}"))
    limit = measure_copy(device, on_event)
    cases: list[_Measured] = []
    measured = (_measure(case, kinds, device, limit, request.repeats, on_event) for case in chosen)
    interruption = gather(measured, cases)
    return BenchResult(
        device=device_name(num_usable_cores(), on_gpu=on_gpu),
        host=describe_host(),
        versions=software_versions(on_gpu=on_gpu, rivals=("torch", "bitsandbytes")),
        limits={COPY: limit},
        rows=tuple(row for case in cases for row in case.rows),
        details={"state_sizes": [size for case in cases for size in case.state_sizes]},
        warnings=tuple(warnings),
        interruption=interruption,
    )


def make_case(name: str) -> Case:
    """LoRA adapters of all linear layers of the 8B shape, or large matrices of full training.

    Raises:
        QtoolError: usage, for another name.
    """
    if name not in CASES:
        raise QtoolError(
            (Option("case", name), ": no such case"),
            kind="usage",
            hint=f"one of {', '.join(CASES)}",
        )
    if name == "full":
        return Case(name, f"{len(FULL_SHAPES)} tensors of 8192x8192", FULL_SHAPES, torch.bfloat16)
    architecture = build_architecture(MODEL_SHAPES[DEFAULT_SHAPE])
    shapes: list[tuple[int, int]] = []
    for layer in target_layers(architecture, ALL_LINEAR):
        inputs, outputs = features(layer)
        shapes += [(LORA_RANK, inputs), (outputs, LORA_RANK)]
    label = f"{len(shapes)} tensors of LoRA, rank {LORA_RANK}, {DEFAULT_SHAPE}"
    return Case(name, label, tuple(shapes), torch.float32)


def _kinds(*, with_rivals: bool, warnings: list[str]) -> Iterator[_Kind]:
    yield _Kind("AdamW", "qtool", lambda p: AdamW8bit(p, lr=LEARNING_RATE))
    yield _Kind("Lion", "qtool", lambda p: Lion8bit(p, lr=LEARNING_RATE))
    yield _Kind("SGD", "qtool", lambda p: SGD8bit(p, lr=LEARNING_RATE, momentum=MOMENTUM))
    if not with_rivals:
        return
    yield _Kind("AdamW", "torch", lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, fused=True))
    try:
        with quiet_bitsandbytes():
            optim: Any = import_module("bitsandbytes.optim")  # it declares no types
    except ImportError as error:
        warnings.append(f"bitsandbytes is not measured: {error}")
        return
    yield _Kind("AdamW", "bitsandbytes", lambda p: optim.AdamW8bit(p, lr=LEARNING_RATE))
    yield _Kind("Lion", "bitsandbytes", lambda p: optim.Lion8bit(p, lr=LEARNING_RATE))
    yield _Kind(
        "SGD", "bitsandbytes", lambda p: optim.SGD8bit(p, lr=LEARNING_RATE, momentum=MOMENTUM)
    )


# -- one case -------------------------------------------------------------------------------------


class _Step:
    """A step of one optimizer; `give` hands it gradients beforehand."""

    def __init__(self, optimizer: Any, parameters: Parameters, gradients: list[list[Tensor]]):
        self.optimizer = optimizer
        self._parameters = parameters
        self._gradients = gradients

    def give(self, i: int) -> None:
        """The gradients of step `i`."""
        fresh = self._gradients[i % len(self._gradients)]
        for parameter, gradient in zip(self._parameters, fresh, strict=True):
            parameter.grad = gradient

    def __call__(self, i: int) -> object:
        """Update the parameters."""
        return self.optimizer.step()

    @property
    def state_bytes(self) -> int:
        """Of all tensors that the optimizer keeps for its parameters; scalars are steps."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(v.nbytes for v in states if isinstance(v, Tensor) and v.numel() > 1)


@dataclass(slots=True)
class StepClock:
    """The wall clock from the call of a step until the device is done."""

    device: torch.device
    runs_per_sample: int = 1

    def time(self, run: Run, first: int) -> Sample:
        """See `Clock.time`; `run` is a `_Step`."""
        step = cast(_Step, run)
        step.give(first)
        self._wait()
        start_s = time.perf_counter()
        step(first)
        launched_s = time.perf_counter()
        self._wait()
        return Sample(time.perf_counter() - start_s, launched_s - start_s)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True)
class _Measured:
    rows: list[Row]
    state_sizes: list[dict[str, Any]]


def _measure(
    case: Case,
    kinds: Sequence[_Kind],
    device: torch.device,
    limit: Limit,
    repeats: int,
    on_event: OnEvent,
) -> _Measured:
    with quiet_bitsandbytes(), out_of_memory_as_error(f"measuring {case.label}"):
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(_draw, case, device, generator)
        parameters = [nn.Parameter(values) for values in draw(PARAMETER_DEVIATION)]
        gradients = [draw(GRADIENT_DEVIATION) for _ in range(NUM_GRADIENTS)]
        contenders, state_sizes = [], []
        for kind in kinds:
            # They share the parameters, which each goes on updating; states are their own.
            step = _Step(kind.make(parameters), parameters, gradients)
            step.give(0)
            step(0)  # makes the states
            per_parameter = step.state_bytes / case.num_parameters
            state_sizes.append(
                {
                    "case": case.name,
                    "op": kind.op,
                    "engine": kind.engine,
                    "state_bytes_per_parameter": per_parameter,
                }
            )
            value_bytes = sum(values.nbytes for values in parameters)
            moved = Moved(2 * value_bytes + step.state_bytes, value_bytes + step.state_bytes)
            contenders.append(Contender(kind.op, kind.engine, moved, step))
        stage = f"measure {case.label}"
        taken = measure(contenders, StepClock(device), repeats, stage, on_event)
    dtype = DTYPE_WORDS[case.dtype]
    rows = [
        make_row(
            m.op,
            case.label,
            dtype,
            m.engine,
            m.seconds,
            m.moved,
            limit_seconds=m.moved.num_bytes / limit.bytes_per_s,
        )
        for m in taken
    ]
    return _Measured(sorted(rows, key=lambda row: (row.op, ENGINES.index(row.engine))), state_sizes)


def _draw(
    case: Case, device: torch.device, generator: torch.Generator, deviation: float
) -> list[Tensor]:
    return [
        torch.empty(shape, dtype=case.dtype, device=device).normal_(
            0, deviation, generator=generator
        )
        for shape in case.shapes
    ]
