"""`qtool quantize`: the plan, carried out.

    result = quantize_checkpoint(checkpoint, plan, Path("out"), choose_backend().backend)

Small files come first. Then a few shards are in work at once: each has a thread that makes its
file, follows with the checksum while the workers fill it, and syncs, journals and renames it.
Manifest and index come after; config.json is the last file to appear. `write_folder` does the same
for whoever else makes a folder of weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from qtool.backends.protocol import Backend
from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.output_place import encode_json, refuse_file
from qtool.checkpoint.reading import CHANGED_HINT, OpenTensors, open_shards
from qtool.checkpoint.records import Checkpoint
from qtool.checkpoint.safetensors_header import EncodedHeader, encode_header
from qtool.checkpoint.weight_files import INDEX
from qtool.errors import QtoolError
from qtool.events import Finished, Note, OnEvent, Started, ignore_events
from qtool.formats.precisions import QuantFormat
from qtool.formats.tensors import SourceDtype
from qtool.quantize.folder_state import SAMPLES, RunIdentity
from qtool.quantize.memory import PeakMemory
from qtool.quantize.output_folder import (
    OutputFolder,
    check_output_folder,
    hash_bytes,
    open_output_folder,
)
from qtool.quantize.pipeline import PipelineSettings, ShardPipeline, warm_up_kernels
from qtool.quantize.plan import QuantPlan, Recipe, ShardPlan, TensorPlan
from qtool.quantize.source_samples import sample_weights
from qtool.quantize.workers import SHARDS_IN_TURN, TileWorkers, open_workers

INDEX_NAME = f"model{INDEX}"
WORTH_SAYING_S = 3.0  # loading compiled kernels takes about a second, compiling them several
REPORT_INTERVAL_S = 0.05  # as often as memory is looked at and progress told
# As many shards are filled as take turns; as many again are being made or synced meanwhile.
OPEN_SHARDS = 2 * SHARDS_IN_TURN


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """A folder to write: its shards, from which tensors they come, and the files beside them.

    Args:
        stage: what progress calls the work.
        checkpoint: whose tensors `shards` name.
        format: of the tensors that are quantized.
        config: for config.json.
        other_files: small files to carry along: name in the folder -> where it lies.
        identity: without `digests`, which follow from the rest.
        input_bytes: of the files that are read.
        source_folders: where nothing may be written.
        open_tensors: reads the tensors' values.
    """

    stage: str
    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    format: QuantFormat
    config: Mapping[str, Any]
    other_files: Mapping[str, Path]
    identity: RunIdentity
    input_bytes: int
    source_folders: tuple[Path, ...]
    open_tensors: OpenTensors = open_shards

    @property
    def tensors(self) -> list[TensorPlan]:
        """All tensors, in output order."""
        return [tensor for shard in self.shards for tensor in shard.tensors]


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run did.

    `input_bytes` and `output_bytes` are file bytes of the shards, `read_bytes` the tensor data that
    this run read: less where it continued another, 0 where the folder was complete already.
    """

    input_bytes: int
    output_bytes: int
    weights_bytes: int
    read_bytes: int
    seconds: float
    resumed: bool
    peak_host_bytes: int
    peak_device_bytes: int


def quantize_checkpoint(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    output: Path,
    backend: Backend,
    settings: PipelineSettings,
    *,
    restart: bool = False,
    on_event: OnEvent = ignore_events,
) -> QuantizeResult:
    """Write `plan` to the folder `output`, continuing an interrupted run of the same command.

    Raises:
        QtoolError: `output` is foreign or was made with other settings; not enough space; a source
            file is short, changed, or holds NaN or Inf. A source that proves bad leaves no output.
    """
    folder_plan = plan_folder(checkpoint, plan)
    return write_folder(folder_plan, output, backend, settings, restart=restart, on_event=on_event)


def plan_folder(checkpoint: Checkpoint, plan: QuantPlan) -> FolderPlan:
    """The folder that `plan` makes; of a model whose headers alone were read, to be looked at."""
    is_here = checkpoint.folder is not None
    return FolderPlan(
        stage="quantize",
        checkpoint=checkpoint,
        shards=plan.shards,
        format=plan.recipe.format,
        config={**checkpoint.config, "quantization_config": dict(plan.config_entry)},
        other_files={n: checkpoint.path_of(n) for n in checkpoint.other_files} if is_here else {},
        identity=RunIdentity(
            source=describe_source(checkpoint),
            options=describe_recipe(plan.recipe),
            source_state=source_state(checkpoint),
            file_names=folder_file_names(plan.shards, checkpoint.other_files),
        ),
        input_bytes=sum(shard.file_bytes for shard in checkpoint.shards),
        source_folders=() if checkpoint.folder is None else (checkpoint.folder,),
    )


def check_output(plan: FolderPlan, output: Path, *, restart: bool = False) -> None:
    """What `write_folder` would refuse about `output`, without writing.

    Raises:
        QtoolError: as `quantize_checkpoint`, of all that can be known before the values are read.
    """
    _check_output(plan, _identify(plan), output, restart=restart)


def write_folder(
    plan: FolderPlan,
    output: Path,
    backend: Backend,
    settings: PipelineSettings,
    *,
    restart: bool = False,
    on_event: OnEvent = ignore_events,
) -> QuantizeResult:
    """Carry `plan` out, or go on with it; raises as `quantize_checkpoint`."""
    identity = _identify(plan)
    peak_memory = PeakMemory(backend)
    resumed, read_bytes, start_s = True, 0, time.perf_counter()
    if not _check_output(plan, identity, output, restart=restart):
        with open_workers(backend, plan.tensors, plan.format, settings, on_event) as workers:
            _warm_up(backend, plan, on_event)
            start_s = time.perf_counter()
            job = _Job(plan, workers, peak_memory, on_event)
            with (
                open_output_folder(output, identity, _sizes(plan), restart=restart) as folder,
                _discarding_refused(folder),
            ):
                resumed = folder.resumed
                read_bytes = _write_files(folder, job)
    return QuantizeResult(
        input_bytes=plan.input_bytes,
        output_bytes=output_file_bytes(plan),
        weights_bytes=sum(shard.weights_bytes for shard in plan.shards),
        read_bytes=read_bytes,
        seconds=time.perf_counter() - start_s,
        resumed=resumed,
        peak_host_bytes=peak_memory.peak_bytes,
        peak_device_bytes=backend.peak_device_bytes,
    )


def output_file_bytes(plan: QuantPlan | FolderPlan) -> int:
    """Bytes of the output's safetensors files, headers included."""
    return sum(_sizes(plan).values())


def _sizes(plan: QuantPlan | FolderPlan) -> dict[str, int]:
    return {shard.file_name: _encode(shard).file_bytes for shard in plan.shards}


def _check_output(plan: FolderPlan, identity: RunIdentity, output: Path, *, restart: bool) -> bool:
    """Whether the folder is complete already; raises as `check_output`."""
    refuse_file(output)
    for source in plan.source_folders:
        _refuse_writing_into_source(source, output)
    return check_output_folder(output, identity, _sizes(plan), restart=restart)


def _warm_up(backend: Backend, plan: FolderPlan, on_event: OnEvent) -> None:
    """Load, and on a machine's first run compile, the kernels that `plan` needs.

    Done before the clock starts, so that rates and the time left are those of the work.
    """
    start_s = time.perf_counter()
    for dtype in sorted({t.source.dtype for t in plan.tensors if t.action == "quantize"}):
        warm_up_kernels(backend, cast(SourceDtype, dtype), plan.format)
    seconds = time.perf_counter() - start_s
    if seconds > WORTH_SAYING_S:
        on_event(Note(f"kernels compiled in {seconds:.1f} s; they are kept for the next run"))


@dataclass(frozen=True, slots=True)
class _Job:
    plan: FolderPlan
    workers: TileWorkers
    peak_memory: PeakMemory
    on_event: OnEvent


@contextmanager
def _discarding_refused(folder: OutputFolder) -> Iterator[None]:
    """A run that finds its source bad leaves nothing; a resumed one keeps what it found."""
    try:
        yield
    except QtoolError as error:
        if not folder.resumed and (error.kind == "bad_file" or not folder.holds_work):
            folder.discard()
        raise


def _write_files(folder: OutputFolder, job: _Job) -> int:
    """Write what is missing; returns the bytes of tensor data read for it."""
    if folder.is_complete:  # another process was at it meanwhile
        return 0
    # Small files before hours of work, lest one of them be gone after that.
    for name, path in job.plan.other_files.items():
        if name not in folder.finished:
            folder.write_file(name, _read_small_file(path, folder.identity.digests[name]))
    read_bytes = _write_shards(folder, job)
    folder.complete(_last_files(job.plan))
    return read_bytes


def _write_shards(folder: OutputFolder, job: _Job) -> int:
    shards = job.plan.shards
    headers = {shard.file_name: _encode(shard) for shard in shards}
    missing = [shard for shard in shards if shard.file_name not in folder.finished]
    total_bytes = sum(shard.input_bytes for shard in shards)
    missing_bytes = sum(shard.input_bytes for shard in missing)
    job.on_event(Started(job.plan.stage, total_bytes, total_bytes - missing_bytes))
    with ThreadPoolExecutor(OPEN_SHARDS, thread_name_prefix="shard") as pool:
        try:
            _follow(
                {
                    pool.submit(_write_shard, folder, job, shard, headers[shard.file_name])
                    for shard in missing
                },
                job,
            )
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            job.workers.stop(error)
            raise
    job.on_event(Finished(job.plan.stage))
    return missing_bytes


def _write_shard(folder: OutputFolder, job: _Job, shard: ShardPlan, header: EncodedHeader) -> None:
    with folder.create_file(shard.file_name, header.file_bytes) as file:
        file.write(header.data, 0)
        names = [output.name for output in shard.outputs()]
        pipeline = ShardPipeline(
            job.plan.checkpoint,
            shard,
            output=file,
            offsets=dict(zip(names, header.offsets, strict=True)),
            context=job.workers.context,
            open_tensors=job.plan.open_tensors,
        )
        with pipeline, job.workers.carrying(pipeline):
            file.sha256()


def _follow(shards: set[Future[None]], job: _Job) -> None:
    """Tell progress and look at memory until all shards are written, or one has failed."""
    while shards:
        done, shards = wait(shards, timeout=REPORT_INTERVAL_S, return_when=FIRST_EXCEPTION)
        job.peak_memory.sample()
        job.workers.report(job.on_event)
        for shard in done:
            shard.result()


def _encode(shard: ShardPlan) -> EncodedHeader:
    return encode_header(shard.outputs())


def _last_files(plan: FolderPlan) -> dict[str, bytes]:
    """What follows from the plan alone; config.json last."""
    index = {INDEX_NAME: encode_json(_index(plan.shards))} if len(plan.shards) > 1 else {}
    return {**index, CONFIG_NAME: encode_json(plan.config)}


def _read_small_file(path: Path, sha256: str) -> bytes:
    """Its bytes, which must still be those that the run began with."""
    data = _read_whole(path)
    found = hash_bytes(data).sha256
    if found != sha256:
        raise QtoolError(
            f"{path}: changed while reading: expected SHA-256 {sha256}, found {found}",
            kind="bad_file",
            hint=CHANGED_HINT,
        )
    return data


def _index(shards: Iterable[ShardPlan]) -> dict[str, Any]:
    shards = tuple(shards)
    weight_map = {output.name: shard.file_name for shard in shards for output in shard.outputs()}
    return {
        "metadata": {"total_size": sum(shard.weights_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _identify(plan: FolderPlan) -> RunIdentity:
    """With the digests of what is known before the work; of small files that are here.

    Raises:
        QtoolError: a small file cannot be read.
    """
    digests = {n: hash_bytes(_read_whole(path)).sha256 for n, path in plan.other_files.items()}
    digests |= {name: hash_bytes(data).sha256 for name, data in _last_files(plan).items()}
    return replace(plan.identity, digests=digests)


def _read_whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QtoolError(
            f"{path}: expected a file to carry along, found none that can be read: "
            f"{error.strerror or error}",
            kind="not_found" if isinstance(error, FileNotFoundError) else "bad_file",
            hint="restore it, or let nothing write to the model's folder meanwhile",
        ) from error


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of a checkpoint that was read."""
    samples = sample_weights(checkpoint)
    return {
        "model": model_name(checkpoint),
        "revision": checkpoint.revision,
        "files": {shard.file_name: shard.file_bytes for shard in checkpoint.shards},
        **({SAMPLES: samples} if samples else {}),
    }


def model_name(checkpoint: Checkpoint) -> str:
    """What a model is called wherever it lies, and however its folder was spelled."""
    return checkpoint.id if checkpoint.location == "hub" else Path(checkpoint.id).resolve().name


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The options that decide about quantized bytes."""
    return {
        "quant": recipe.format.precision,
        "blocksize": recipe.format.blocksize,
        "quant_storage": recipe.format.quant_storage,
        "skip": list(recipe.skip),
        "compute_dtype": recipe.compute_dtype,
        "int8_threshold": recipe.int8_threshold,
        "max_shard_bytes": recipe.max_shard_bytes,
    }


def source_state(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Sizes and times of the files of a checkpoint that is read; {} if they are not here."""
    if checkpoint.folder is None:
        return {}
    paths = {shard.file_name: checkpoint.path_of(shard.file_name) for shard in checkpoint.shards}
    stats = {name: path.stat() for name, path in paths.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def folder_file_names(shards: Iterable[ShardPlan], other_files: Iterable[str]) -> tuple[str, ...]:
    """Every file that a run writes, but the manifest."""
    shard_names = [shard.file_name for shard in shards]
    index = [INDEX_NAME] if len(shard_names) > 1 else []
    return (*shard_names, *other_files, *index, CONFIG_NAME)


def _refuse_writing_into_source(folder: Path, output: Path) -> None:
    source, target = folder.resolve(), output.resolve()
    if target == source or source in target.parents:
        raise QtoolError(
            f"{output} lies in the source folder {folder}",
            kind="usage",
            hint="choose a folder outside of it with -o",
        )
