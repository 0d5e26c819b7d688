"""`qtool bench quantize`: the whole command, beside a raw read and write of the same files.

    result = bench_quantize(QuantizeBenchRequest(shape="llama-3.1-8b"))

In turns: read the source's files, write files of the output's sizes, run `qtool quantize` as a user
would, from the start of the process to its exit; a few times, transformers + bitsandbytes load the
same folder and save what they made of it to the same place. Every output is new and is removed
before the next. A first round fills caches and compiles kernels; it does not count.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from qtool.backends import BackendChoice, ChosenBackend, choose_backend, cpu, cuda
from qtool.backends.cpu import num_usable_cores
from qtool.bench.duration import announce
from qtool.bench.interruption import interruptible
from qtool.bench.machine import describe_host, device_name, software_versions
from qtool.bench.model_shapes import DEFAULT_SHAPE, read_model_shape
from qtool.bench.operations import DTYPE_WORDS
from qtool.bench.random_checkpoint import CheckpointFiles, plan_checkpoint, write_checkpoint
from qtool.bench.raw_files import RawTransfer
from qtool.bench.records import BenchResult, Moved, Row, make_limit, make_row
from qtool.bench.watched_process import Ended, MemoryPeaks, run_watched
from qtool.bench.work_folder import describe_storage, open_work_folder
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.records import Checkpoint
from qtool.checkpoint.safetensors_header import encode_header
from qtool.errors import Option, QtoolError
from qtool.events import Advanced, Finished, Note, OnEvent, Started, ignore_events
from qtool.formats.precisions import DEFAULT_PRECISION, QuantFormat, QuantizedPrecision
from qtool.formats.tensors import SourceDtype
from qtool.quantize.command import check_before_download
from qtool.quantize.plan import QuantPlan, Recipe, build_plan

RAW_READ: Final = "raw read"
RAW_WRITE: Final = "raw write"
MEMORY_COUNTED: Final = (
    "peak_host_bytes: anonymous and page-locked memory as qtool counts it; memory: the largest "
    "RssAnon and RssShmem of /proc/PID/status, sampled from outside; the page cache is in none"
)


@dataclass(frozen=True, slots=True)
class QuantizeBenchRequest:
    """What to measure.

    Without `model`, random weights of the model shape `shape` are made (see `read_model_shape`).
    `num_threads` None leaves the number to qtool; `rival_repeats` 0 leaves out the rival.
    """

    model: str | None = None
    shape: str = DEFAULT_SHAPE
    work_dir: Path | None = None
    precision: QuantizedPrecision = DEFAULT_PRECISION
    backend: BackendChoice = "auto"
    repeats: int = 5
    rival_repeats: int = 1
    num_threads: int | None = None


@dataclass(frozen=True, slots=True)
class QtoolRun:
    """One run of the command: `wall_seconds` from start to exit, the rest as it says itself."""

    wall_seconds: float
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    memory: MemoryPeaks


@dataclass(frozen=True, slots=True)
class RivalRun:
    """One run of transformers + bitsandbytes; loading and saving without the imports."""

    wall_seconds: float
    load_seconds: float
    save_seconds: float
    peak_device_bytes: int
    memory: MemoryPeaks


@dataclass(slots=True)
class Samples:
    """What the rounds collect."""

    read_seconds: list[float] = field(default_factory=list)
    write_seconds: list[float] = field(default_factory=list)
    runs: list[QtoolRun] = field(default_factory=list)
    rival_runs: list[RivalRun] = field(default_factory=list)
    rival_versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def bench_quantize(request: QuantizeBenchRequest, on_event: OnEvent = ignore_events) -> BenchResult:
    """Measure.

    Raises:
        QtoolError: an unknown shape, no space, no such backend here, a source that cannot be
            quantized, a run of the command that fails or gives other bytes than the one before.
    """
    if not 0 <= request.rival_repeats <= request.repeats:
        raise QtoolError(
            (
                Option("rival_repeat", request.rival_repeats),
                ": the rival has a turn in each of the first rounds, of which there are "
                f"{request.repeats}",
            ),
            kind="usage",
            hint=(
                Option("rival_repeat", request.repeats),
                " or fewer, or a higher ",
                Option("repeat"),
            ),
        )
    chosen = choose_backend(request.backend)
    on_event(Note(f"backend  {chosen.backend.name} ({chosen.reason})"))
    transfer = _raw_transfer(chosen.backend.name, request.num_threads)
    with interruptible(), _open_source(request, transfer, on_event) as source:
        turns = _Turns(request, source, chosen.backend.name, transfer)
        samples = turns.take(on_event)
        return _result(request, source, chosen, transfer, samples)


def _raw_transfer(backend: str, num_threads: int | None) -> RawTransfer:
    """As many threads as the command will have workers, and tiles as large as its.

    The backend itself is not asked: it would keep the GPU awake, and the command start quicker.
    """
    if backend == "cuda":
        return RawTransfer(
            num_threads or min(num_usable_cores(), cuda.MAX_WORKERS), cuda.DEFAULT_TILE_BYTES
        )
    return RawTransfer(num_threads or num_usable_cores(), cpu.DEFAULT_TILE_BYTES)


# -- the source -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What is quantized, and the folder for outputs."""

    label: str
    checkpoint: Checkpoint
    plan: QuantPlan
    work_folder: Path

    @property
    def folder(self) -> Path:
        assert self.checkpoint.folder is not None  # its files are local
        return self.checkpoint.folder

    @property
    def moved(self) -> Moved:
        """File bytes in and out, headers included."""
        input_bytes = sum(shard.file_bytes for shard in self.checkpoint.shards)
        return Moved(input_bytes, sum(_output_sizes(self.plan).values()))

    @property
    def dtypes(self) -> str:
        """Of the weights that are quantized, in the contract's words."""
        found = {t.source.dtype for t in self.plan.tensors if t.action == "quantize"}
        return "+".join(DTYPE_WORDS[cast(SourceDtype, dtype)] for dtype in sorted(found))


def _output_sizes(plan: QuantPlan) -> dict[str, int]:
    return {shard.file_name: encode_header(shard.outputs()).file_bytes for shard in plan.shards}


@contextmanager
def _open_source(
    request: QuantizeBenchRequest, transfer: RawTransfer, on_event: OnEvent
) -> Iterator[_Source]:
    recipe = Recipe(format=QuantFormat(request.precision))
    if request.model is not None:
        check_before_download(request.model, recipe)
        checkpoint = open_checkpoint(request.model, need="files", on_event=on_event)
        plan = build_plan(checkpoint, recipe)
        needed = sum(_output_sizes(plan).values())
        with open_work_folder(request.work_dir, needed) as folder:
            label = Path(checkpoint.id).resolve().name
            on_event(Note(_task_text(request, label, folder)))
            yield _Source(label, checkpoint, plan, folder)
        return
    label, config = read_model_shape(request.shape)
    files: CheckpointFiles = plan_checkpoint(config)
    plan = build_plan(files.as_checkpoint(), recipe)
    needed = files.file_bytes + sum(_output_sizes(plan).values())
    with open_work_folder(request.work_dir, needed) as folder:
        on_event(Note(_task_text(request, label, folder)))
        write_checkpoint(files, folder / "source", transfer.num_threads, on_event)
        checkpoint = open_checkpoint(str(folder / "source"), need="files")
        yield _Source(label, checkpoint, build_plan(checkpoint, recipe), folder)


def _task_text(request: QuantizeBenchRequest, label: str, folder: Path) -> str:
    rival = "; transformers + bitsandbytes in {} of them" if request.rival_repeats else ""
    return (
        f"{label} to {request.precision}, in {folder.parent}: a round to warm up and "
        f"{request.repeats} that count{rival.format(request.rival_repeats)}"
    )


# -- taking turns ---------------------------------------------------------------------------------


class _Turns:
    """Everybody's turn, round after round, each with an output folder that is new."""

    def __init__(
        self,
        request: QuantizeBenchRequest,
        source: _Source,
        backend: str,
        transfer: RawTransfer,
    ) -> None:
        self._request = request
        self._source = source
        self._backend = backend
        self._transfer = transfer
        self._output = source.work_folder / "output"
        self._samples = Samples()
        self._checksums: dict[str, Any] | None = None

    def take(self, on_event: OnEvent) -> Samples:
        """All rounds; the first one does not count."""
        moved, request = self._source.moved, self._request
        rounds = request.repeats + 1
        stage = "measure"
        total = rounds * 2 * moved.num_bytes + request.rival_repeats * moved.num_bytes
        on_event(Started(stage, total, is_transfer=False))
        for number in range(rounds):
            start_s = time.perf_counter()
            if number == 1:
                self._samples = Samples()
            self._samples.read_seconds.append(self._read())
            on_event(Advanced(moved.input_bytes, RAW_READ))
            self._samples.write_seconds.append(self._write())
            on_event(Advanced(moved.output_bytes, RAW_WRITE))
            self._samples.runs.append(self._run_qtool())
            on_event(Advanced(moved.num_bytes, "qtool quantize"))
            if number == 0:
                left_s = request.repeats * (time.perf_counter() - start_s)
                announce(f"{request.repeats} rounds", left_s, on_event)
            if 0 < number <= request.rival_repeats and not self._samples.warnings:
                self._run_rival()
                on_event(Advanced(moved.num_bytes, "transformers + bitsandbytes"))
        on_event(Finished(stage))
        return self._samples

    def _read(self) -> float:
        shards = self._source.checkpoint.shards
        return self._transfer.time_reading(self._source.folder / s.file_name for s in shards)

    def _write(self) -> float:
        with self._new_output():
            self._output.mkdir()
            sizes = _output_sizes(self._source.plan).items()
            return self._transfer.time_writing({self._output / name: size for name, size in sizes})

    def _run_qtool(self) -> QtoolRun:
        with self._new_output():
            ended = run_watched([sys.executable, "-m", "qtool", *self._arguments()])
            if ended.exit_code:
                raise _failed(ended)
            self._compare_checksums()
            said = json.loads(ended.stdout)
        return QtoolRun(
            ended.seconds,
            said["seconds"],
            said["peak_host_bytes"],
            said["peak_device_bytes"],
            ended.memory,
        )

    def _arguments(self) -> list[str]:
        request = self._request
        words = ["quantize", str(self._source.folder), "--output", str(self._output)]
        words += ["--quant", request.precision, "--backend", self._backend, "--json"]
        if request.num_threads is not None:
            words += ["--threads", str(request.num_threads)]
        return words

    def _compare_checksums(self) -> None:
        """A fast run that writes other bytes is no good."""
        checksums = json.loads((self._output / MANIFEST).read_bytes())["files"]
        if self._checksums not in (None, checksums):
            raise QtoolError(
                "two runs of qtool quantize on the same source wrote different bytes",
                kind="internal",
                hint="this is a bug in qtool, so nothing was measured; please report it",
            )
        self._checksums = checksums

    def _run_rival(self) -> None:
        """A rival that fails is a warning, and gets no other turn."""
        device = "cuda:0" if self._backend == "cuda" else "cpu"
        result = self._source.work_folder / "rival.json"
        words = [str(self._source.folder), str(self._output), self._request.precision, device]
        module = "qtool.bench.transformers_process"
        with self._new_output():
            ended = run_watched([sys.executable, "-m", module, *words, str(result)])
        if ended.exit_code:
            reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.exit_code}"])[-1]
            self._samples.warnings.append(f"transformers + bitsandbytes is not measured: {reason}")
            return
        found = json.loads(result.read_bytes())
        self._samples.rival_versions = found["versions"]
        self._samples.rival_runs.append(
            RivalRun(
                ended.seconds,
                found["load_seconds"],
                found["save_seconds"],
                found["peak_device_bytes"],
                ended.memory,
            )
        )

    @contextmanager
    def _new_output(self) -> Iterator[None]:
        """The output folder's name is free, and is free again afterwards."""
        try:
            yield
        finally:
            shutil.rmtree(self._output, ignore_errors=True)


def _failed(ended: Ended) -> QtoolError:
    """The error that the command itself has reported."""
    last_line = (ended.stderr.strip().splitlines() or [""])[-1]
    try:
        error = json.loads(last_line)["error"]
        return QtoolError(
            f"qtool quantize failed: {error['message']}", kind=error["kind"], hint=error["hint"]
        )
    except (ValueError, KeyError, TypeError):
        return QtoolError(
            f"qtool quantize ended with exit code {ended.exit_code}: {last_line}",
            kind="internal",
            hint="run it by itself with QTOOL_DEBUG=1",
        )


# -- from samples to the result -------------------------------------------------------------------


def _result(
    request: QuantizeBenchRequest,
    source: _Source,
    chosen: ChosenBackend,
    transfer: RawTransfer,
    samples: Samples,
) -> BenchResult:
    on_gpu = chosen.backend.name == "cuda"
    rows = quantize_rows(samples, request.precision, source.label, source.dtypes, source.moved)
    read, write, command = rows[:3]
    limit_s = max(read.seconds_median, write.seconds_median)
    return BenchResult(
        device=device_name(transfer.num_threads, on_gpu=on_gpu),
        host=describe_host(),
        versions=software_versions(on_gpu=on_gpu) | samples.rival_versions,
        limits={"raw_read": make_limit(read), "raw_write": make_limit(write)},
        rows=rows,
        details={
            "backend": chosen.backend.name,
            "backend_reason": chosen.reason,
            "quant": request.precision,
            "model": request.model,
            "model_shape": source.label,
            "storage": {
                "source": describe_storage(source.folder),
                "output": describe_storage(source.work_folder),
            },
            "num_threads": transfer.num_threads,
            "tile_bytes": transfer.tile_bytes,
            "input_bytes": source.moved.input_bytes,
            "output_bytes": source.moved.output_bytes,
            "limit_seconds": limit_s,
            "times_limit": command.seconds_median / limit_s,
            "memory_counted": MEMORY_COUNTED,
            "runs": [asdict(run) for run in samples.runs],
            "rival_runs": [asdict(run) for run in samples.rival_runs],
        },
        warnings=tuple(samples.warnings),
    )


def quantize_rows(
    samples: Samples, precision: str, shape: str, dtype: str, moved: Moved
) -> tuple[Row, ...]:
    """Raw read, raw write, the command; load + save of the rival and its parts.

    The limit is the slower one of read and write: both can go on at the same time.
    """
    read_s = statistics.median(samples.read_seconds)
    write_s = statistics.median(samples.write_seconds)
    limit_s = max(read_s, write_s)
    read, written = Moved(moved.input_bytes, 0), Moved(0, moved.output_bytes)
    op = f"quantize {precision}"
    command_s = [run.wall_seconds for run in samples.runs]
    rows = [
        make_row(RAW_READ, shape, dtype, "limit", samples.read_seconds, read, limit_seconds=read_s),
        make_row(
            RAW_WRITE, shape, dtype, "limit", samples.write_seconds, written, limit_seconds=write_s
        ),
        make_row(op, shape, dtype, "qtool", command_s, moved, limit_seconds=limit_s),
    ]
    rival = samples.rival_runs
    if rival:
        parts = {
            op: [run.load_seconds + run.save_seconds for run in rival],
            f"{op}: load": [run.load_seconds for run in rival],
            f"{op}: save": [run.save_seconds for run in rival],
            f"{op}: start to exit": [run.wall_seconds for run in rival],
        }
        rows += [
            make_row(
                part, shape, dtype, "transformers+bitsandbytes", took, moved, limit_seconds=limit_s
            )
            for part, took in parts.items()
        ]
    return tuple(rows)
