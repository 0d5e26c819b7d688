"""`qtool bench finetune`: a step of QLoRA beside PEFT + bitsandbytes, its memory beside the plan.

    result = bench_finetune(FinetuneBenchRequest(shape="llama-3.1-8b", against="bitsandbytes"))

A plain loop without a trainer: forward pass under bfloat16 autocast with gradient checkpointing,
loss, backward pass, AdamW with 8-bit states. All engines train over the same packed bytes, each
with adapters of its own that begin alike, on the same random tokens.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Literal

import torch
from torch import Tensor

from qtool.bench.bitsandbytes_layers import share_network
from qtool.bench.duration import announce
from qtool.bench.interruption import gather
from qtool.bench.machine import describe_host, device_name, software_versions
from qtool.bench.model_shapes import DEFAULT_SHAPE, read_model_shape
from qtool.bench.records import Engine, median_absolute_deviation
from qtool.bench.step_bytes import StepBytes
from qtool.errors import Option, QtoolError
from qtool.events import Note, OnEvent, ignore_events
from qtool.finetune.head_loss import use_chunked_loss
from qtool.finetune.lora_layers import wrap_with_lora
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantizedPrecision
from qtool.optim import AdamW8bit
from qtool.planner.estimate import EstimateRequest, estimate_opened
from qtool.planner.records import Tuning, Workload
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import DeviceMemory, out_of_memory_as_error
from qtool.runtime.placement import resolve_device
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.random_model import build_random_model
from qtool.runtime.requirements import require_bitsandbytes

Rival = Literal["bitsandbytes"]

DEFAULTS: Final = {True: (DEFAULT_SHAPE, 2048), False: ("llama-3.2-1b", 64)}  # by "on a GPU"
WARM_UPS: Final = 2
NUM_BATCHES: Final = 3  # that take turns
LEARNING_RATE: Final = 1e-4
DROPOUT: Final = 0.05
OWN: Final[Engine] = "qtool"
RIVAL: Final[Engine] = "peft+bitsandbytes"


@dataclass(frozen=True, slots=True)
class FinetuneBenchRequest:
    """What to measure: `batch` sequences of `length` tokens a step, random weights of `shape`.

    None for shape or length is what suits the device.
    """

    shape: str | None = None
    quant: QuantizedPrecision = "nf4-dq"
    batch: int = 2
    length: int | None = None
    lora_r: int = 16
    steps: int = 10
    gradient_checkpointing: bool = True
    against: Rival | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class FinetuneRun:
    """One engine: the median of `n` steps, and its memory; planned only for qtool itself.

    `final_loss` is that of the last step, after as many steps on the same tokens.
    """

    engine: Engine
    n: int
    step_seconds_median: float
    step_seconds_mad: float
    tokens_per_s: float
    allocated_peak_bytes: int
    planned_peak_bytes: int | None
    trainable_parameters: int
    final_loss: float


@dataclass(frozen=True, slots=True)
class FinetuneBenchResult:
    """A whole measurement with sequences of `length` tokens.

    `interruption` is what ended it early, after some of its runs.
    """

    device: str
    host: dict[str, Any]
    versions: dict[str, str]
    model: str
    request: FinetuneBenchRequest
    length: int
    runs: tuple[FinetuneRun, ...]
    warnings: tuple[str, ...] = ()
    interruption: QtoolError | None = None


def bench_finetune(
    request: FinetuneBenchRequest, on_event: OnEvent = ignore_events
) -> FinetuneBenchResult:
    """Measure.

    Raises:
        QtoolError: a shape that is not there or cannot be packed, no such device, a rival that is
            not installed, or too little memory.
    """
    if request.quant not in QUANTIZED_PRECISIONS:
        raise QtoolError(
            (Option("quant", request.quant), ": QLoRA trains over a packed model"),
            kind="usage",
            hint=f"one of {', '.join(QUANTIZED_PRECISIONS)}",
        )
    device = resolve_device(request.device)
    on_gpu = device.type == "cuda"
    usual_shape, usual_length = DEFAULTS[on_gpu]
    length = request.length or usual_length
    label, config = read_model_shape(request.shape or usual_shape, option="shape")
    step = StepBytes.of_config(config, request.quant, None)
    longest = step.model.architecture.max_context if step.model.architecture else None
    if longest is not None and length > longest:
        raise QtoolError(
            (Option("length", length), f": {label} was made for {longest} tokens"),
            kind="usage",
            hint=("a smaller ", Option("length")),
        )
    if request.against is not None:
        require_bitsandbytes()
    on_event(Note(f"{label} in {request.quant} on {device}: {_task_text(request, length)}"))
    on_event(Note(f"making random weights of {label} on the device"))
    loaded = build_random_model(config, request.quant, device=str(device), model_id=label)
    warnings: list[str] = []
    runs: list[FinetuneRun] = []
    planned_bytes = _planned_bytes(request, length, step)
    measured = _Measurement(request, length, loaded, planned_bytes, warnings)
    interruption = gather(measured.runs(on_event), runs)
    rivals = ("torch", "transformers", "peft", *(("bitsandbytes",) if len(runs) > 1 else ()))
    return FinetuneBenchResult(
        device=device_name(torch.get_num_threads(), on_gpu=on_gpu),
        host=describe_host(),
        versions=software_versions(on_gpu=on_gpu, rivals=rivals),
        model=label,
        request=request,
        length=length,
        runs=tuple(runs),
        warnings=tuple(warnings),
        interruption=interruption,
    )


def _task_text(request: FinetuneBenchRequest, length: int) -> str:
    each = " of each engine" if request.against else ""
    return (
        f"steps of {request.batch} x {length} tokens; {WARM_UPS} to warm up and {request.steps} "
        f"that count{each}"
    )


def _planned_bytes(request: FinetuneBenchRequest, length: int, step: StepBytes) -> int:
    """What `estimate --mode qlora` says that PyTorch's allocator hands out at the peak."""
    tuning = Tuning(
        lora_r=request.lora_r,
        lora_dropout=DROPOUT,
        optimizer="adamw-8bit",
        gradient_checkpointing=request.gradient_checkpointing,
    )
    workload = Workload(length, request.batch, mode="qlora", tuning=tuning)
    asked = EstimateRequest(
        step.model.id, quants=(request.quant,), context=length, workload=workload
    )
    return estimate_opened(step.model, (), asked).plans[0].allocated_peak_bytes


class _Measurement:
    """One model's packed bytes, over which each engine trains in its turn."""

    def __init__(
        self,
        request: FinetuneBenchRequest,
        length: int,
        loaded: LoadedModel,
        planned_bytes: int,
        warnings: list[str],
    ) -> None:
        self._request = request
        self._loaded = loaded
        self._planned_bytes = planned_bytes
        self._warnings = warnings
        loaded.model.config.use_cache = False
        vocab_size = loaded.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_BATCHES, request.batch, length)
        self._tokens = torch.randint(vocab_size, shape, generator=generator).to(loaded.device)

    def runs(self, on_event: OnEvent) -> Iterator[FinetuneRun]:
        """qtool, then the rival; one that fails is a warning."""
        yield self._run(OWN, on_event)
        if self._request.against is None:
            return
        try:
            with quiet_bitsandbytes():
                yield self._run(RIVAL, on_event)
        except QtoolError:
            raise
        except Exception as error:  # whatever it raises is its own affair
            first_line = str(error).strip().partition("\n")[0]
            self._warnings.append(f"{RIVAL} is not measured: {first_line}")

    def _run(self, engine: Engine, on_event: OnEvent) -> FinetuneRun:
        request = self._request
        tokens = self._tokens[0].numel()
        with out_of_memory_as_error(f"a step of {engine}"), quiet_transformers():
            _free_memory()
            memory = DeviceMemory(self._loaded.device)
            model = self._trainable(engine)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = _make_optimizer(engine, trained)
            times = []
            for number in range(WARM_UPS + request.steps):
                start_s = time.perf_counter()
                loss = self._step(model, optimizer, self._tokens[number % NUM_BATCHES])
                self._wait()
                times.append(time.perf_counter() - start_s)
                if number == 0:
                    on_event(Note(f"{engine}: the first step took {times[0]:.1f} s"))
                if number == WARM_UPS - 1:
                    announce(f"{request.steps} steps", request.steps * times[-1], on_event)
            median = statistics.median(times[WARM_UPS:])
            run = FinetuneRun(
                engine=engine,
                n=request.steps,
                step_seconds_median=median,
                step_seconds_mad=median_absolute_deviation(times[WARM_UPS:]),
                tokens_per_s=tokens / median,
                allocated_peak_bytes=memory.allocated_peak_bytes(),
                planned_peak_bytes=self._planned_bytes if engine == OWN else None,
                trainable_parameters=sum(p.numel() for p in trained),
                final_loss=float(loss),
            )
            del model, trained, optimizer, loss
        _free_memory()
        return run

    def _trainable(self, engine: Engine) -> Any:
        """A model over the loaded one's tensors, with fresh adapters on all linear layers."""
        from peft import LoraConfig, get_peft_model

        request, base = self._request, self._loaded.model
        config = LoraConfig(
            r=request.lora_r,
            lora_alpha=2 * request.lora_r,
            lora_dropout=DROPOUT,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)  # adapters begin at random
        if engine == OWN:
            shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
            model = wrap_with_lora(copy.deepcopy(base, shared).requires_grad_(False), config)
            if not use_chunked_loss(model):
                self._warnings.append("the model's own loss is used, which makes all logits")
        else:
            network = share_network(base)
            is_int8 = request.quant == "int8"
            network.is_loaded_in_8bit, network.is_loaded_in_4bit = is_int8, not is_int8
            model = get_peft_model(network.requires_grad_(False), config)
        if request.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def _step(self, model: Any, optimizer: Any, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _wait(self) -> None:
        if self._loaded.device.type == "cuda":
            torch.cuda.synchronize(self._loaded.device)


def _make_optimizer(engine: Engine, parameters: list[Any]) -> Any:
    if engine == OWN:
        return AdamW8bit(parameters, lr=LEARNING_RATE)
    optim: Any = import_module("bitsandbytes.optim")  # it declares no types
    return optim.AdamW8bit(parameters, lr=LEARNING_RATE)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
