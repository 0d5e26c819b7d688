"""TRL's SFTTrainer, told to be quiet, watched step by step, and stopped where it must be.

    trainer = build_trainer(model, tokenizer, sequences, ...)
    trainer.train(resume_from_checkpoint=None)

Nothing here trains: loop, saves, data order and the mathematics of a step are TRL's, transformers'
and PEFT's.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
import transformers
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from qtool.errors import EXIT_TERMINATED, Option, QtoolError, Words
from qtool.finetune.optimizers import optimizer_class
from qtool.finetune.packing import require_apart
from qtool.finetune.records import (
    FinetuneRequest,
    OnProgress,
    Progress,
    Scheduler,
    Step,
)
from qtool.finetune.run_folder import is_whole, mark_whole
from qtool.finetune.sequences import IGNORED_LABEL, Sequences
from qtool.formats.precisions import ComputeDtype

SAVES_KEPT: Final = 2  # while a new one is written, the one before is whole
SPEED_WINDOW: Final = 20  # steps that the speed is a mean of
SCHEDULERS: Final[dict[Scheduler, str]] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what a process computes; `device` as PyTorch names it."""

    device: torch.device
    compute_dtype: ComputeDtype

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss that the model itself gives, and the number of tokens its only
    metric: entropy and accuracy would want the logits.

    It writes no model card: the manifest says what was done.
    """

    _total_train_tokens: Any  # a tensor on the GPU between logs
    _held_out: Any  # float64 (2,): the losses and the number of the tokens measured

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As transformers' Trainer has it; where routers have a loss of their own, as TRL has."""
        if self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        computed = transformers.Trainer.compute_loss(
            self, model, inputs, return_outputs, num_items_in_batch
        )
        if self.model.training:
            self._count_tokens(inputs)
        return computed

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Leaves the random numbers as they were, so that measuring changes nothing."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """With the mean over the tokens learned, as a step's loss is one: transformers' is over the
        batches, so another for each batch size."""
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        answer = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._held_out, reduction="sum")
        answer.metrics[f"{metric_key_prefix}_loss"] = float(total / count.clamp(min=1))
        return answer

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds up what `evaluation_loop` divides: the loss of all tokens, and their number."""
        labels = self._without_repeats(inputs["labels"])
        answer = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        count = (labels[..., 1:] != IGNORED_LABEL).sum()
        total = torch.where(count > 0, answer[0] * count, 0)  # the mean of none may be NaN
        self._held_out += torch.stack((total, count)).to(self._held_out)
        return answer

    def _without_repeats(self, labels: Any) -> Any:
        """Ignore the rows that fill up the last batches, where several processes share the rows."""
        state, size = self.accelerator.gradient_state, self.args.per_device_eval_batch_size
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        labels = labels.clone()
        labels[max(0, state.remainder - self.args.process_index * size) :] = IGNORED_LABEL
        return labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the tokens so far, which the GPU is not waited for at each of a step's passes."""
        if self.model.training and not self.aux_loss_enabled:
            self._total_train_tokens = int(self._total_train_tokens)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _count_tokens(self, inputs: Any) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        count = torch.tensor(ids.numel()) if mask is None else mask.sum()
        self._total_train_tokens += self.accelerator.gather(count.to(ids.device)).sum()


def build_config(request: FinetuneRequest, place: Placement, folder: Path, *, evals: bool) -> Any:
    """The Trainer's arguments; making them starts the processes' group where there are several."""
    training, data = request.training, request.data
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=training.batch,
        # Rows that only fill up the last batch of several processes are told by their place in it;
        # sequences that are packed have none.
        per_device_eval_batch_size=1 if request.data.packing else training.batch,
        gradient_accumulation_steps=training.grad_accum,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate(request.method),
        lr_scheduler_type=SCHEDULERS[training.scheduler],
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        seed=training.seed,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=SAVES_KEPT,
        eval_strategy="steps" if evals else "no",
        eval_steps=training.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show a mean in place of NaN
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=place.compute_dtype == "bfloat16",
        fp16=place.compute_dtype == "float16",
        use_cpu=not place.is_cuda,
        dataloader_pin_memory=place.is_cuda,
        ddp_find_unused_parameters=False,
        max_length=data.max_length,
        packing=data.packing,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def build_trainer(
    model: Any,
    tokenizer: Any,
    arguments: Any,
    request: FinetuneRequest,
    train: Sequences,
    held_out: Sequences | None,
    watch: Watch,
) -> Trainer:
    """The trainer over a model that has its adapters already.

    Raises:
        QtoolError: unsupported, for packed sequences and a model that does not keep them apart.
    """
    training, place = request.training, watch.place
    if request.data.packing:  # now, since packing the data takes long
        require_apart(model, place.device, getattr(torch, place.compute_dtype))
    optimizer = optimizer_class(
        training.optimizer,
        lr=training.learning_rate(request.method),
        weight_decay=training.weight_decay,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train.as_dataset(),
        eval_dataset=held_out.as_dataset() if held_out else None,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    watch.trainer = trainer
    return trainer


@dataclass
class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Follows the steps: tells of each, marks saves as whole, stops on request and on NaN.

    `history` and `eval_history` are the whole run's, a resumed one's earlier steps too.
    """

    request: FinetuneRequest
    place: Placement
    on_progress: OnProgress
    trainer: Any = None
    stop_signal: int | None = None
    history: list[Step] = field(default_factory=list)
    eval_history: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    first_tokens: int = 0  # of the steps before this process
    start_s: float = 0.0
    train_s: float = 0.0
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))
    _first_step: int = 0
    _has_stopped: bool = False

    @property
    def session_tokens_per_s(self) -> float:
        """Of this process."""
        return (self.tokens - self.first_tokens) / self.train_s if self.train_s else 0.0

    # -- called by the Trainer --------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a resumed run knows already."""
        for entry in state.log_history:
            self._take(entry)
        # TRL counts from 0 in every process.
        self.trainer._total_train_tokens = self.first_tokens = self.tokens
        self._first_step = state.global_step
        self.start_s = time.perf_counter()
        self._recent.clear()  # of steps that took no time here
        self._recent.append((self.start_s, self.tokens))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """After every step, before it is saved."""
        entry = {**(logs or {}), "step": state.global_step}
        self._take(entry)
        if "loss" not in entry and "eval_loss" not in entry:
            return
        self._require_finite(entry)
        self.train_s = time.perf_counter() - self.start_s
        if self.history:
            self.on_progress(self._progress(state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if a signal asked for it, in all processes after the same step."""
        asked = torch.tensor([self.stop_signal or 0], device=args.device)
        if args.world_size > 1:
            asked = self.trainer.accelerator.gather(asked)
        number = int(asked.max())
        if number:
            self.stop_signal = number
            self._has_stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A save counts once every process has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    # -- after it ---------------------------------------------------------------------------------

    def raise_if_stopped(self, state: Any) -> None:
        """Raise the QtoolError of a run that a signal ended before its last step."""
        if not self._has_stopped:
            return
        is_terminated = self.stop_signal == signal.SIGTERM
        raise QtoolError(
            f"{'terminated' if is_terminated else 'interrupted'} after step {state.global_step} of "
            f"{state.max_steps}; it is saved",
            kind="interrupted",
            hint=("the same command with ", Option("resume"), " goes on from there"),
            exit_code=EXIT_TERMINATED if is_terminated else None,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _take(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self.history.append(
                Step(int(entry["step"]), float(entry["loss"]), float(entry["learning_rate"]))
            )
            self.tokens = int(entry.get("num_tokens", self.tokens))
            self._recent.append((time.perf_counter(), self.tokens))
        if "eval_loss" in entry:
            self.eval_history.append((int(entry["step"]), float(entry["eval_loss"])))

    def _require_finite(self, entry: dict[str, Any]) -> None:
        loss = float(entry.get("loss", entry.get("eval_loss", 0.0)))
        norm = float(entry.get("grad_norm") or 0.0)
        # With float16 a scaler meets infinite gradients, skips the step and goes on.
        is_bad_norm = not math.isfinite(norm) and self.place.compute_dtype != "float16"
        if math.isfinite(loss) and not is_bad_norm:
            return
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        saves = Path(self.trainer.args.output_dir).glob("checkpoint-*")
        has_save = any(map(is_whole, saves))
        step = int(entry["step"])
        is_changed = step > 1 or "loss" not in entry  # the loss is of before a step's update
        raise diverged(
            what, step, self.request, self.place, has_save=has_save, is_changed=is_changed
        )

    def _progress(self, state: Any) -> Progress:
        (then_s, then_tokens), (now_s, now_tokens) = self._recent[0], self._recent[-1]
        done = state.global_step - self._first_step
        left = state.max_steps - state.global_step
        return Progress(
            step=state.global_step,
            total_steps=state.max_steps,
            loss=self.history[-1].loss,
            tokens_per_s=(now_tokens - then_tokens) / (now_s - then_s) if now_s > then_s else 0.0,
            left_s=self.train_s / done * left if done else 0.0,
            memory_bytes=torch.cuda.max_memory_allocated(self.place.device)
            if self.place.is_cuda
            else None,
            eval_loss=self.eval_history[-1][1] if self.eval_history else None,
        )


def diverged(
    what: str,
    step: int,
    request: FinetuneRequest,
    place: Placement,
    *,
    has_save: bool,
    is_changed: bool,
) -> QtoolError:
    """The error for numbers that are none; of a model that is not changed yet the learning rate is
    not to blame."""
    lr = request.training.learning_rate(request.method)
    hint: tuple[str | Option, ...] = (
        "nothing was changed yet, so the model itself makes such numbers: look for NaN in its "
        "weights; `qtool quantize` names the tensor",
    )
    if is_changed:
        hint = (
            Option("restart"),
            " with a lower ",
            Option("lr", f"{lr / 4:g}"),
            " or a longer ",
            Option("warmup", 0.1),
        )
    if place.compute_dtype == "float16":
        hint += (", or with ", Option("compute_dtype", "float32"))
    kept = "the last save is kept" if has_save else "nothing was saved before it"
    return QtoolError(
        f"{what} at step {step}, so training stopped; {kept}",
        kind="usage",
        hint=hint,
        exit_code=1,
    )


@contextmanager
def same_bits(place: Placement) -> Iterator[None]:
    """Have PyTorch take the kernels that give the same sums each time, where it has them: the
    backward pass of attention else adds in whatever order its blocks end."""
    if not place.is_cuda:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    debugging: Any = torch.utils.deterministic
    fills = debugging.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    debugging.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        debugging.fill_uninitialized_memory = fills


@contextmanager
def signals_to(watch: Watch, warn: Callable[[Words], None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM stop the run after its step; a second one acts as before."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        watch.stop_signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        warn("stopping after this step; once more stops at once, without saving it")

    for number in previous:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
