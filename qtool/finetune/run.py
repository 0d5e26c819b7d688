"""A run from MODEL and DATA to OUT, in two halves: what can be said before, and the training.

prepared = prepare(request, warn=print)
prepared.planned.require_fit()
result = train(prepared, on_event=..., on_progress=..., warn=print)
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.output_place import hold_lock
from qtool.checkpoint.records import Checkpoint
from qtool.errors import Option, QtoolError, Words
from qtool.events import Finished, Note, OnEvent, Started, ignore_events
from qtool.finetune.plan import PlannedRun, num_processes, plan_run
from qtool.finetune.records import (
    DEFAULT_SPLIT,
    DataFile,
    DataOptions,
    FinetuneRequest,
    FinetuneResult,
    OnProgress,
)
from qtool.finetune.rows import Rows, open_rows
from qtool.finetune.run_folder import (
    LOCK,
    MANIFEST,
    MANIFEST_SCHEMA,
    RunFolder,
    identity_of,
    no_space_in_words,
    step_of,
)
from qtool.finetune.sequences import no_chat_template
from qtool.planner.estimate import unmodelled_warnings
from qtool.runtime.tokenizer_files import lacks_chat_template

if TYPE_CHECKING:
    from qtool.finetune.sequences import Sequences
    from qtool.finetune.trainer import Watch

Warn = Callable[[Words], None]
LOGGERS: Final = ("trl", "peft", "accelerate", "datasets", "bitsandbytes")
PACKAGES: Final = ("torch", "transformers", "accelerate", "peft", "trl", "datasets")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before any weight is read.

    Args:
        finished: the result of the run that OUT holds, if that is what was asked for.
    """

    planned: PlannedRun
    rows: Rows
    held_out: Rows | float | None
    files: tuple[DataFile, ...]
    folder: RunFolder
    finished: FinetuneResult | None = None


def is_main_process() -> bool:
    """Whether this process writes and speaks: the first of all under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def prepare(request: FinetuneRequest, *, warn: Warn, on_event: OnEvent = ignore_events) -> Prepared:
    """Check OUT, the options, every row of the data, and plan the memory. Writes nothing.

    Raises:
        QtoolError: what is wrong with any of them.
    """
    folder = RunFolder(request.output)
    if is_main_process():  # the others would see what the first has begun already
        folder.check(resume=request.resume, restart=request.restart)
    earlier = _earlier(folder) if request.resume else None
    checkpoint = open_checkpoint(
        request.model, need="headers", need_weights=True, on_event=on_event
    )
    planned = plan_run(request, checkpoint)
    # Not those of quantizing, which speak of the dtype that `generate` computes in.
    for text in (*planned.model.warnings, *unmodelled_warnings(planned.model)):
        warn(text)
    rows = open_rows(request.data)
    held_out = _held_out(request)
    only = request.data.completion_only
    files = [rows.check(completion_only=only)]
    if rows.has_messages and lacks_chat_template(checkpoint):
        raise no_chat_template(rows.source)
    if isinstance(held_out, Rows):
        files.append(held_out.check(completion_only=only))
    for words in _without_effect(request.data, rows):
        warn(words)
    prepared = Prepared(planned, rows, held_out, tuple(files), folder)
    if earlier is None:
        return prepared
    description, result = earlier
    folder.require_same(description, _by_name(_description(prepared)))
    return replace(prepared, finished=result)


def _earlier(folder: RunFolder) -> tuple[dict[str, Any], FinetuneResult] | None:
    """What the finished run in OUT was of, and its result.

    Raises:
        QtoolError: bad_file, if its manifest is damaged.
    """
    manifest = folder.manifest
    if manifest is None:
        return None
    try:
        return _by_name(manifest), FinetuneResult.from_manifest(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        lacks = f"expected {error}, found nothing"
        what = lacks if isinstance(error, KeyError) else f"not as a finished run has it: {error}"
        raise folder.damaged(folder.path / MANIFEST, what) from error


def _without_effect(data: DataOptions, rows: Rows) -> Iterator[Words]:
    """What to say of options that rows of this kind have no use for."""
    if rows.kind == "running text":
        if data.packing:
            yield (Option("packing"), " changes nothing: a running text fills its sequences anyway")
        if data.text_column is not None:
            yield (
                Option("text_column", data.text_column),
                " changes nothing: a text has no columns",
            )
    if rows.is_file:
        if data.subset is not None:
            yield (Option("subset", data.subset), " changes nothing: DATA is a file")
        if data.split != DEFAULT_SPLIT:
            yield (Option("split", data.split), " changes nothing: DATA is a file")


def train(
    prepared: Prepared,
    *,
    warn: Warn,
    on_event: OnEvent = ignore_events,
    on_progress: OnProgress,
) -> FinetuneResult:
    """Load, train and write OUT.

    Raises:
        QtoolError: what is wrong with the model or the data; usage for a run that diverges;
            no_space, before the first step or at a save; interrupted, with the last step saved.
    """
    if not is_main_process():
        on_event, warn = ignore_events, _ignore
    on_event(Note("load     PyTorch and the tokenizer"))
    with _locked(prepared.folder), _quiet():
        _import_packages(on_event)
        from qtool.runtime.memory import out_of_memory_as_error

        _require_class(prepared.planned)
        with (
            _in_finetune_words(),
            out_of_memory_as_error("training"),
            no_space_in_words(prepared.folder),
        ):
            run = _Run.start(prepared, warn, on_event)
            on_event(Note("train    waiting for the first step"))
            return run.finish(on_progress, warn)


def _import_packages(on_event: OnEvent) -> None:
    """PyTorch, transformers, PEFT and TRL: some seconds, in which there is nothing else to see."""
    on_event(Started("importing", 0, is_transfer=False))
    importlib.import_module("qtool.finetune.network")
    importlib.import_module("qtool.finetune.trainer")
    on_event(Finished("importing"))


def _require_class(planned: PlannedRun) -> None:
    """Raise QtoolError for a model that transformers does not build, before OUT is begun for it."""
    from qtool.runtime.model_config import find_model_class, parse_config

    find_model_class(parse_config(planned.model.config, planned.model.id))


def _ignore(words: Words) -> None:
    pass


def _held_out(request: FinetuneRequest) -> Rows | float | None:
    asked = request.data.eval_split
    if not asked:
        return None
    try:
        share = float(asked)
    except ValueError:
        return open_rows(request.data, asked)
    if not 0 < share < 1:
        raise QtoolError(
            (Option("eval_split", asked), ": expected a share between 0 and 1, or a file"),
            kind="usage",
            hint=Option("eval_split", 0.05),
        )
    return share


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose model is loaded."""

    prepared: Prepared
    checkpoint: Checkpoint
    trainer: Any
    watch: Watch
    tokenizer: Any
    num_trainable: int
    memory: Any
    resume_from: Path | None

    @classmethod
    def start(cls, prepared: Prepared, warn: Warn, on_event: OnEvent) -> _Run:
        """Tokenize, load, wrap; then begin OUT, so that what is refused leaves nothing there."""
        from qtool.finetune.head_loss import use_chunked_loss
        from qtool.finetune.network import choose_placement, load_base, make_trainable
        from qtool.finetune.trainer import Watch, build_config, build_trainer
        from qtool.runtime.loading import load_tokenizer

        planned, request = prepared.planned, prepared.planned.request
        # 1. The data, before gigabytes are loaded for it.
        place = choose_placement(request)
        checkpoint = open_checkpoint(request.model, need="files", on_event=on_event)
        tokenizer = load_tokenizer(checkpoint)
        _set_pad_token(tokenizer)
        data, held_out = _encode(prepared, tokenizer, warn)
        _tell_of(data, held_out, on_event)
        # 2. The run that OUT holds, and the space for another.
        folder = prepared.folder
        request = replace(request, data=replace(request.data, max_length=planned.max_length))
        identity = _identity(request, checkpoint, data, held_out)
        if is_main_process():
            folder.check_run(identity, resume=request.resume, restart=request.restart)
            if planned.is_known:
                folder.require_space(_output_bytes(prepared, data))
        # 3. The model.
        arguments = build_config(request, place, folder.checkpoints, evals=held_out is not None)
        loaded = load_base(planned, place, on_event)
        network, num_trainable = make_trainable(loaded.model, request, checkpoint)
        is_chunked = use_chunked_loss(network)
        watch = Watch(request, place, _ignore)
        trainer = build_trainer(network, tokenizer, arguments, request, data, held_out, watch)
        if not is_chunked and not trainer.aux_loss_enabled:  # which TRL computes, in tiles
            warn(
                f"{type(loaded.model).__name__} computes its loss by itself, from all logits at "
                "once, which take more memory than planned"
            )
        # 4. OUT.
        has_begun = folder.is_begun
        resume_from = _begin(folder, request, identity)
        if request.resume and has_begun:
            _tell_of_resuming(resume_from, on_event)
        return cls(
            prepared,
            checkpoint,
            trainer,
            watch,
            tokenizer,
            num_trainable,
            loaded.memory,
            resume_from,
        )

    def finish(self, on_progress: OnProgress, warn: Warn) -> FinetuneResult:
        """Train, then write what was learned."""
        from qtool.finetune.trainer import same_bits, signals_to

        is_main = is_main_process()
        self.watch.on_progress = on_progress if is_main else _ignore  # type: ignore[assignment]
        start_s = time.perf_counter()
        resume_from = None if self.resume_from is None else str(self.resume_from)
        with signals_to(self.watch, warn), same_bits(self.watch.place):
            if not self._takes_up_the_end():
                self.trainer.train(resume_from_checkpoint=resume_from)
        self.watch.raise_if_stopped(self.trainer.state)
        result = self._result(time.perf_counter() - start_s)
        if is_main:
            self._write(result)
        self.trainer.accelerator.wait_for_everyone()
        return result

    def _takes_up_the_end(self) -> bool:
        """Whether the save is of the last step, so that only the result is left to write.

        The Trainer takes a step before it looks at how many there are to be.
        """
        if self.resume_from is None:
            return False
        from transformers import TrainerState

        state = TrainerState.load_from_json(str(self.resume_from / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return False
        self.trainer._load_from_checkpoint(str(self.resume_from))
        self.trainer.state = state
        self.watch.on_train_begin(self.trainer.args, state, self.trainer.control)
        return True

    def _result(self, seconds: float) -> FinetuneResult:
        planned, watch, state = self.prepared.planned, self.watch, self.trainer.state
        is_cuda, plan = watch.place.is_cuda, planned.plan
        is_known = planned.is_known
        return FinetuneResult(
            output=str(planned.request.output),
            method=planned.request.method,
            quant=planned.quant,
            first_loss=watch.history[0].loss,
            final_loss=watch.history[-1].loss,
            eval_loss=watch.eval_history[-1][1] if watch.eval_history else None,
            steps=state.global_step,
            tokens=watch.tokens,
            tokens_per_s=watch.session_tokens_per_s,
            seconds=seconds,
            allocated_peak_bytes=self.memory.allocated_peak_bytes() if is_cuda else None,
            planned_peak_bytes=plan.peak_bytes if is_known else None,
            planned_allocated_peak_bytes=plan.allocated_peak_bytes if is_known else None,
            trainable_parameters=self.num_trainable,
            device=str(watch.place.device),
            resumed_from_step=None if self.resume_from is None else step_of(self.resume_from),
            earlier_tokens=watch.first_tokens,
            history=tuple(watch.history),
            eval_history=tuple(watch.eval_history),
        )

    def _write(self, result: FinetuneResult) -> None:
        from qtool.finetune.network import base_name
        from qtool.runtime.loading import load_tokenizer
        from qtool.runtime.model_config import model_dtype

        request, folder = self.prepared.planned.request, self.prepared.folder
        network = self.trainer.accelerator.unwrap_model(self.trainer.model)
        made = folder.checkpoints / "result"
        if made.exists():  # what one that was cut short left
            shutil.rmtree(made)
        made.mkdir()
        if request.method == "full":
            network.config.use_cache = True
            network.to(model_dtype(self.checkpoint, None)).save_pretrained(made)
            load_tokenizer(self.checkpoint).save_pretrained(made)
        else:
            config = network.peft_config["default"]
            config.base_model_name_or_path = base_name(self.checkpoint, request)
            config.revision = self.checkpoint.revision
            network.save_pretrained(made, save_embedding_layers=False)
        folder.finish(made, _manifest(self.prepared, self.checkpoint, result))


# -- the data -------------------------------------------------------------------------------------


def _encode(prepared: Prepared, tokenizer: Any, warn: Warn) -> tuple[Sequences, Sequences | None]:
    from qtool.finetune.sequences import encode

    request, rows = prepared.planned.request, prepared.rows
    max_length, only = prepared.planned.max_length, request.data.completion_only
    data = encode(rows, tokenizer, max_length=max_length, completion_only=only)
    held_out = None
    if isinstance(prepared.held_out, float):
        is_running = rows.kind == "running text"
        held_out = data.hold_out(prepared.held_out, request.training.seed, is_running=is_running)
    elif prepared.held_out is not None:
        held_out = encode(prepared.held_out, tokenizer, max_length=max_length, completion_only=only)
    for sequences in (data, held_out):
        for words in sequences.warnings() if sequences else ():
            warn(words)
    return data, held_out


def _tell_of(data: Sequences, held_out: Sequences | None, on_event: OnEvent) -> None:
    num = len(data.items)
    text = f"tokens   {data.num_tokens:,} in {num:,} sequence{'s' * (num != 1)}"
    if held_out:
        text += f"; {len(held_out.items):,} held out"
    on_event(Note(text))


def _tell_of_resuming(save: Path | None, on_event: OnEvent) -> None:
    where = f"goes on after step {step_of(save):,}" if save else "no save yet: from the start"
    on_event(Note(f"resume   {where}"))


def _set_pad_token(tokenizer: Any) -> None:
    """Padding is masked, so any token will do; the end token is what people expect there."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


# -- OUT ------------------------------------------------------------------------------------------


def _output_bytes(prepared: Prepared, data: Sequences) -> int:
    """What OUT holds at its fullest, at the least: the result or a new save beside those kept.

    Small files are not counted, such as the tokenizer that each save has.
    """
    from qtool.finetune.trainer import SAVES_KEPT

    planned, request = prepared.planned, prepared.planned.request
    parts = planned.plan.components
    trained = parts["weights" if request.method == "full" else "adapters"].bytes
    save_bytes = trained + parts["optimizer"].bytes
    result_bytes = trained
    if request.method == "full" and request.training.master_dtype == "fp32":
        result_bytes //= 2  # which is written in the model's own dtype
    steps = _num_steps(planned, data)
    saves = math.ceil(steps / request.training.save_steps)
    last_bytes = min(saves, SAVES_KEPT) * save_bytes + result_bytes
    last = prepared.folder.last_whole() if request.resume else None
    if last is not None and step_of(last) >= steps:  # only the result is left to write
        return last_bytes
    return max(last_bytes, min(saves, SAVES_KEPT + 1) * save_bytes)


def _num_steps(planned: PlannedRun, data: Sequences) -> int:
    """How many there will be, or not more than that where sequences are packed."""
    training = planned.request.training
    if training.max_steps is not None:
        return training.max_steps
    sequences = len(data.items)
    if planned.request.data.packing:
        sequences = math.ceil(data.num_tokens / planned.max_length)
    passes = math.ceil(sequences / (training.batch * num_processes()))
    return math.ceil(training.epochs * math.ceil(passes / training.grad_accum))


def _identity(
    request: FinetuneRequest, checkpoint: Checkpoint, data: Sequences, held_out: Sequences | None
) -> dict[str, Any]:
    """What the run depends on."""
    return identity_of(
        request.settings(),
        {
            "revision": checkpoint.revision,
            "tokens_sha256": data.sha256(),
            "eval_tokens_sha256": held_out.sha256() if held_out else None,
            "processes": num_processes(),
        },
    )


def _begin(folder: RunFolder, request: FinetuneRequest, identity: Mapping[str, Any]) -> Path | None:
    """Write what the run depends on, or compare; returns the save to go on from, for all
    processes."""
    from accelerate.utils import broadcast_object_list

    found = [None]
    if is_main_process():
        save = folder.begin(identity, resume=request.resume, restart=request.restart)
        found = [str(save) if save else None]  # type: ignore[list-item]
    broadcast_object_list(found)
    return Path(found[0]) if found[0] else None


def _by_name(description: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and the checksums of the data, each under a name that people know."""
    names = ("DATA", "the held-out rows")
    sums = {
        f"SHA-256 of {name}": file["sha256"]
        for name, file in zip(names, description["data"], strict=False)
    }
    return {**description["options"], **sums}


def _description(prepared: Prepared) -> dict[str, Any]:
    """What a run is of, as its manifest says."""
    planned = prepared.planned
    return {
        "data": [file._asdict() for file in prepared.files],
        "options": planned.request.settings() | {"max_length": planned.max_length},
    }


def _manifest(prepared: Prepared, checkpoint: Checkpoint, result: FinetuneResult) -> dict[str, Any]:
    from importlib.metadata import version

    from qtool import __version__

    request = prepared.planned.request
    return {
        "schema": MANIFEST_SCHEMA,
        "qtool_version": __version__,
        "versions": {name: version(name) for name in PACKAGES},
        "model": {
            "id": request.model,
            "revision": checkpoint.revision,
            "quant": prepared.planned.quant,
        },
        **_description(prepared),
        "result": result.to_dict(),
        "losses": [list(step) for step in result.history],
        "eval_losses": [list(entry) for entry in result.eval_history],
    }


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Keep another process out of OUT; those of one launch are let in by the first."""
    if not is_main_process():
        yield
        return
    was_there = folder.path.exists()
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.checkpoints / LOCK, folder.path):
        try:
            yield
        finally:
            folder.drop_if_not_begun(is_ours=not was_there)


# -- others' words --------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries log and draw; ours say it."""
    import logging

    import datasets

    from qtool.runtime.quiet import quiet_transformers

    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _in_finetune_words() -> Iterator[None]:
    """What would take less memory here, which the loader cannot know."""
    try:
        yield
    except QtoolError as error:
        if error.kind != "memory":
            raise
        raise error.with_hint(
            (
                "try a smaller ",
                Option("batch"),
                " with more ",
                Option("grad_accum"),
                ", a shorter ",
                Option("max_length"),
                ", or ",
                Option("optimizer", "paged-adamw-8bit"),
            )
        ) from error


__all__ = ["Prepared", "is_main_process", "prepare", "train"]
