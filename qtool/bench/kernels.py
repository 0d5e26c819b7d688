"""`qtool bench kernels`: every kernel beside a copy of the same weight and beside bitsandbytes.

    result = bench_kernels(KernelRequest(shapes=((28672, 8192),)))

All engines take turns on the same random weights, which are more than the caches hold. What qtool's
kernels make of them is compared with the reference before anything is timed, products with float64
(`qtool.bench.products`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Final

from qtool.backends import BackendChoice, choose_backend
from qtool.backends.cpu import num_usable_cores
from qtool.bench.bitsandbytes_kernels import Bitsandbytes, NoRivalError
from qtool.bench.contenders import (
    MIN_REPEATS,
    NUM_WARM_UPS,
    Contender,
    Measured,
    check_repeats,
    measure,
)
from qtool.bench.devices import Device
from qtool.bench.interruption import gather
from qtool.bench.machine import describe_host, device_name, software_versions
from qtool.bench.operations import (
    BLOCKSIZE,
    DTYPE_WORDS,
    MIN_ROUNDED_TOKENS,
    OPERATIONS,
    PRODUCTS,
    Operation,
    Product,
    Shape,
    choose_operations,
    shape_text,
    value_bytes,
)
from qtool.bench.records import BenchResult, Limit, Moved, Row, make_limit, make_row
from qtool.bench.reference_check import check_result
from qtool.bench.weights import Weight
from qtool.errors import Option, QtoolError
from qtool.events import Note, OnEvent, ignore_events
from qtool.formats.tensors import SourceDtype
from qtool.runtime.requirements import require_run_extra

COPY: Final = "copy"
CUDA_SHAPE: Final[Shape] = (28672, 8192)  # the feed-forward weight of a 70-billion-parameter model
CPU_SHAPE: Final[Shape] = (4096, 14336)  # that of one with 8 billion
CUDA_DTYPES: Final[tuple[SourceDtype, ...]] = ("BF16", "F16", "F32")
CPU_DTYPES: Final[tuple[SourceDtype, ...]] = ("BF16",)


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What to measure; an empty tuple or None means what suits the device.

    `words` choose operations, see `choose_operations`. Products multiply each of `tokens` rows at
    a time. `num_threads` matters on the CPU.
    """

    shapes: tuple[Shape, ...] = ()
    words: tuple[str, ...] = ()
    dtypes: tuple[SourceDtype, ...] = ()
    backend: BackendChoice = "auto"
    repeats: int = MIN_REPEATS
    num_threads: int | None = None
    with_rival: bool = True
    tokens: tuple[int, ...] = (1,)


def bench_kernels(request: KernelRequest, on_event: OnEvent = ignore_events) -> BenchResult:
    """Measure.

    Raises:
        QtoolError: an unknown operation, too few repeats, no such backend here, too little memory,
            or a kernel that gives other bytes than the reference.
    """
    operations, products = choose_operations(request.words)
    _check_numbers(request)
    products = tuple(p for p in products if p.min_tokens <= max(request.tokens))
    if not operations and not products:
        raise _too_few_tokens(request)
    chosen = choose_backend(request.backend)
    on_gpu = chosen.backend.name == "cuda"
    on_event(Note(f"backend  {chosen.backend.name} ({chosen.reason})"))
    num_threads = request.num_threads or num_usable_cores()
    warnings: list[str] = []
    if products and (reason := _why_no_products(on_gpu=on_gpu)):
        if not operations:
            raise QtoolError(reason, kind="unsupported", hint='pip install "qtool[run]"')
        warnings.append(reason)
        products = ()
    rival = _find_rival(request, warnings, on_gpu=on_gpu, num_threads=num_threads)
    groups = _Groups(request, operations, products, rival, on_gpu, num_threads, on_event)
    measured: list[list[Row]] = []
    on_event(Note(groups.task_text))
    with _open_device(on_gpu, num_threads) as device:
        name = device_name(num_threads, on_gpu=on_gpu)
        interruption = gather(groups.measure(device, warnings), measured)
        versions = software_versions(on_gpu=on_gpu, rivals=("torch", "bitsandbytes"))
        runs_per_sample = device.clock.runs_per_sample
    rows = [row for group in measured for row in group]
    return BenchResult(
        device=name,
        host=describe_host(),
        versions=versions,
        limits=_limits(rows),
        rows=tuple(rows),
        details={
            "backend": chosen.backend.name,
            "backend_reason": chosen.reason,
            "blocksize": BLOCKSIZE,
            "runs_per_sample": runs_per_sample,
            "double_quant_ratios": double_quant_ratios(rows),
        },
        warnings=tuple(warnings),
        interruption=interruption,
    )


def _check_numbers(request: KernelRequest) -> None:
    check_repeats(request.repeats)
    if min(request.tokens) < 1:
        raise QtoolError(
            (
                Option("rows", min(request.tokens)),
                ": a product has at least one row of activations",
            ),
            kind="usage",
            hint=(Option("rows", 1), " or more"),
        )


def _too_few_tokens(request: KernelRequest) -> QtoolError:
    return QtoolError(
        (Option("rows", max(request.tokens)), ": activations are rounded where there are more"),
        kind="usage",
        hint=(Option("rows", MIN_ROUNDED_TOKENS), " or more"),
    )


# -- all shapes and dtypes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Groups:
    """What is measured, group by group."""

    request: KernelRequest
    operations: Sequence[Operation]
    products: Sequence[Product]
    rival: Bitsandbytes | None
    on_gpu: bool
    num_threads: int
    on_event: OnEvent

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the weights."""
        return self.request.shapes or (CUDA_SHAPE if self.on_gpu else CPU_SHAPE,)

    @property
    def dtypes(self) -> tuple[SourceDtype, ...]:
        """Of the weights."""
        return self.request.dtypes or (CUDA_DTYPES if self.on_gpu else CPU_DTYPES)

    @property
    def task_text(self) -> str:
        """What is going to be done."""
        numbers = ((len(self.operations), "operation"), (len(self.products), "product"))
        what = " and ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in numbers if n)
        shapes = ", ".join(map(shape_text, self.shapes))
        dtypes = ", ".join(DTYPE_WORDS[dtype] for dtype in self.dtypes)
        return (
            f"{what} on weights of {shapes} in {dtypes}: {NUM_WARM_UPS} rounds to warm up and "
            f"{self.request.repeats} that count"
        )

    def measure(self, device: Device, warnings: list[str]) -> Iterator[list[Row]]:
        """The rows of each; what has to be said of them is added to `warnings`."""
        for shape, dtype in product(self.shapes, self.dtypes):
            if self.operations:
                group = _Group(device, self.rival, shape, dtype, self.operations)
                measured = group.measure(self.request.repeats, self.on_event)
                warnings.extend(host_bound_warnings(measured, group.label))
                yield group_rows(measured, shape_text(shape), DTYPE_WORDS[dtype])
                _release(device, self.rival)
            if not (self.on_gpu and dtype == "F32"):  # models there have 16 bit
                yield from self._measure_products(shape, dtype, warnings)

    def _measure_products(
        self, shape: Shape, dtype: SourceDtype, warnings: list[str]
    ) -> Iterator[list[Row]]:
        for tokens in self.request.tokens:
            place = _ProductPlace(self.on_gpu, self.num_threads, shape, dtype, tokens)
            if taken := [p for p in self.products if tokens >= p.min_tokens]:
                repeats = self.request.repeats
                rows, failures = place.measure(taken, self.rival, repeats, self.on_event)
                warnings.extend(failures)
                yield rows


# -- one shape and dtype --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """What is measured in turns: a copy, and all operations on weights of one shape and dtype."""

    device: Device
    rival: Bitsandbytes | None
    shape: Shape
    dtype: SourceDtype
    operations: Sequence[Operation]

    @property
    def label(self) -> str:
        return f"{DTYPE_WORDS[self.dtype]} {shape_text(self.shape)}"

    def measure(self, repeats: int, on_event: OnEvent) -> list[Measured]:
        on_event(Note(f"{self.label}: making weights and comparing results"))
        weights = self.device.make_weights(self.shape, self.dtype, self.operations)
        contenders = [self._copy(weights), *self._own(weights)]
        if self.rival is not None:
            contenders += self.rival.contenders(self.operations, weights)
        return measure(contenders, self.device.clock, repeats, f"measure {self.label}", on_event)

    def _copy(self, weights: Sequence[Weight]) -> Contender:
        runs = [self.device.bind_copy(weight) for weight in weights]
        num_bytes = value_bytes(self.shape, self.dtype)
        return Contender(COPY, "limit", Moved(num_bytes, num_bytes), partial(_run_in_turn, runs))

    def _own(self, weights: Sequence[Weight]) -> Iterator[Contender]:
        """qtool's kernels, checked; every weight is quantized before any is dequantized."""
        for precision in dict.fromkeys(operation.precision for operation in self.operations):
            for weight in weights:
                self.device.bind(Operation("quantize", precision), weight)()
        for operation in self.operations:
            runs = [self.device.bind(operation, weight) for weight in weights]
            runs[0]()
            check_result(operation, weights[0], self.device.to_host)
            moved = operation.moved(self.shape, self.dtype)
            yield Contender(operation.name, "qtool", moved, partial(_run_in_turn, runs))


@dataclass(frozen=True, slots=True)
class _ProductPlace:
    """Products of `tokens` rows with weights of one shape and dtype; torch does them all."""

    on_gpu: bool
    num_threads: int
    shape: Shape
    dtype: SourceDtype
    tokens: int

    def measure(
        self,
        products: Sequence[Product],
        rival: Bitsandbytes | None,
        repeats: int,
        on_event: OnEvent,
    ) -> tuple[list[Row], list[str]]:
        """The rows, and a sentence for each product that the rival failed at."""
        import torch

        from qtool.bench.products import ProductGroup

        torch.set_num_threads(self.num_threads)
        device = torch.device("cuda" if self.on_gpu else "cpu")
        group = ProductGroup(
            device, self.shape, self.dtype, self.tokens, products, with_rival=rival is not None
        )
        measured, compared = group.measure(repeats, on_event)
        if self.on_gpu:
            torch.cuda.empty_cache()
        errors = compared.errors
        rows = [
            replace(row, tokens=self.tokens, relative_error=errors.get((row.op, row.engine)))
            for row in group_rows(measured, shape_text(self.shape), DTYPE_WORDS[self.dtype])
        ]
        return rows, compared.warnings


def _why_no_products(*, on_gpu: bool) -> str | None:
    """What keeps products, which torch calls, from being measured; None if nothing does."""
    try:
        require_run_extra()
    except QtoolError as error:
        return f"products are not measured: {error.message}"
    import torch

    if on_gpu and not torch.cuda.is_available():
        return "products are not measured: torch sees no GPU"
    return None


def _run_in_turn(runs: Sequence[Any], i: int) -> object:
    return runs[i % len(runs)]()


# -- from samples to rows -------------------------------------------------------------------------


def group_rows(measured: Sequence[Measured], shape: str, dtype: str) -> list[Row]:
    """A row for each; the limit is the copy among `measured`, taken per byte."""
    copy = next(m for m in measured if m.engine == "limit")
    copied = make_row(COPY, shape, dtype, "limit", copy.seconds, copy.moved, limit_seconds=0)
    return [
        make_row(
            m.op,
            shape,
            dtype,
            m.engine,
            m.seconds,
            m.moved,
            limit_seconds=copied.seconds_median * (m.moved.num_bytes / copied.bytes),
        )
        for m in sorted(measured, key=_place_in_table)
    ]


def _place_in_table(measured: Measured) -> tuple[int, str]:
    """The limit first, then operation by operation, qtool before others."""
    names = [COPY, *(known.name for known in (*OPERATIONS, *PRODUCTS))]
    return names.index(measured.op), "" if measured.engine == "qtool" else measured.engine


def host_bound_warnings(measured: Sequence[Measured], label: str) -> list[str]:
    """A sentence if launches took as long as the kernels themselves."""
    names = [f"{m.op} ({m.engine})" for m in measured if m.is_host_bound]
    if not names:
        return []
    return [
        f"{label}: launching took as long as running for {', '.join(names)}, so these are no "
        "figures of kernels; take a larger --shape"
    ]


def double_quant_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times as long every operation takes with double quantization as without."""
    seconds = {
        (row.op, row.shape, row.dtype, row.tokens, row.engine): row.seconds_median for row in rows
    }
    return [
        {
            "op": op,
            "shape": shape,
            "dtype": dtype,
            "tokens": tokens,
            "engine": engine,
            "seconds_ratio": with_dq / bare,
        }
        for (op, shape, dtype, tokens, engine), with_dq in seconds.items()
        if op.endswith("-dq")
        and engine != "torch"  # it has no packed weights
        and (bare := seconds.get((op.removesuffix("-dq"), shape, dtype, tokens, engine)))
    ]


def _limits(rows: Sequence[Row]) -> dict[str, Limit]:
    return {
        " ".join((row.op, row.shape, row.dtype, *_tokens_text(row))): make_limit(row)
        for row in rows
        if row.engine == "limit"
    }


def _tokens_text(row: Row) -> tuple[str, ...]:
    return () if row.tokens is None else (f"x{row.tokens}",)


# -- the machine ----------------------------------------------------------------------------------


@contextmanager
def _open_device(on_gpu: bool, num_threads: int) -> Iterator[Device]:
    from qtool.bench.cpu_device import CpuDevice
    from qtool.bench.cuda_device import CudaDevice

    device: Device = CudaDevice() if on_gpu else CpuDevice(num_threads)
    try:
        yield device
    finally:
        device.close()


def _find_rival(
    request: KernelRequest, warnings: list[str], *, on_gpu: bool, num_threads: int
) -> Bitsandbytes | None:
    if not request.with_rival:
        return None
    try:
        return Bitsandbytes(on_gpu=on_gpu, num_threads=num_threads)
    except NoRivalError as error:
        warnings.append(str(error))
        return None


def _release(device: Device, rival: Bitsandbytes | None) -> None:
    device.release()
    if rival is not None:
        rival.release()
