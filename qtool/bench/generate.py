"""`qtool bench generate`: how fast tokens come, beside what reading the weights would allow.

    result = bench_generate(GenerateBenchRequest(shape="llama-3.1-8b", against="bitsandbytes"))

All engines compute with the same tensors in the same memory and take turns; a first round fills
caches, captures graphs and does not count. Means and standard deviations are over the others.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor

from qtool.bench.bitsandbytes_layers import share_network
from qtool.bench.duration import LONG_S, announce
from qtool.bench.generate_engines import GenerateEngine, QtoolEngine, TransformersEngine
from qtool.bench.generate_records import GenerateBenchResult, GenerateRun, Samples, Size, Timing
from qtool.bench.generate_subject import Subject, choose_subject
from qtool.bench.generate_summary import summarize
from qtool.bench.interruption import gather, interruptible
from qtool.bench.machine import describe_host, device_name, software_versions
from qtool.bench.model_shapes import DEFAULT_SHAPE
from qtool.bench.records import Engine, Limit
from qtool.bench.torch_device import measure_copy
from qtool.errors import Option, QtoolError
from qtool.events import Advanced, Finished, Note, OnEvent, Started, ignore_events
from qtool.formats.precisions import QUANTIZED_PRECISIONS, Precision
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.decoders.choose import DecoderOptions
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import DeviceMemory, out_of_memory_as_error
from qtool.runtime.placement import resolve_device
from qtool.runtime.requirements import require_bitsandbytes

Rival = Literal["bitsandbytes"]

# Shape, new tokens and runs by "on a GPU": a CPU is not to take minutes for them.
DEFAULTS: Final = {True: (DEFAULT_SHAPE, 256, 5), False: ("llama-3.2-1b", 64, 3)}
LEAST_NEW_TOKENS: Final = 2  # the first one belongs to prefill


@dataclass(frozen=True, slots=True)
class GenerateBenchRequest:
    """What to measure.

    Without `model`, a model of the shape `shape` with random weights is made on the device (see
    `read_model_shape`). `precision` None is what MODEL is stored in if it is packed, else nf4-dq.
    Every one of `batches` is measured with every one of `prompts`, numbers of tokens. None for
    shape, new tokens or runs is what suits the device.
    """

    model: str | None = None
    shape: str | None = None
    precision: Precision | None = None
    head_precision: Precision | None = None
    prompts: tuple[int, ...] = (128,)
    new_tokens: int | None = None
    batches: tuple[int, ...] = (1,)
    repeats: int | None = None
    against: Rival | None = None
    decoding: DecoderOptions = field(default_factory=DecoderOptions)
    device: str = "auto"

    def sized_for(self, device: torch.device) -> Self:
        """The same with a shape, new tokens and runs: of DEFAULTS where none were given."""
        shape, new_tokens, repeats = DEFAULTS[device.type == "cuda"]
        return replace(
            self,
            shape=self.shape or shape,
            new_tokens=new_tokens if self.new_tokens is None else self.new_tokens,
            repeats=repeats if self.repeats is None else self.repeats,
        )

    @property
    def sizes(self) -> list[Size]:
        """All combinations; of a request that is `sized_for` a device."""
        assert self.new_tokens is not None
        return [
            Size(batch, prompt, self.new_tokens)
            for batch in self.batches
            for prompt in self.prompts
        ]

    @property
    def num_runs(self) -> int:
        """That count, of each engine; the same."""
        assert self.repeats is not None
        return self.repeats

    @property
    def num_engines(self) -> int:
        """That take turns."""
        return 1 if self.against is None else 2


def bench_generate(
    request: GenerateBenchRequest, on_event: OnEvent = ignore_events
) -> GenerateBenchResult:
    """Measure.

    Raises:
        QtoolError: a model or shape that is not there or does not run, a size beyond its context,
            no such device, a rival that is not installed, or too little memory.
    """
    device = resolve_device(request.device)
    request = request.sized_for(device)
    if min(size.new_tokens for size in request.sizes) < LEAST_NEW_TOKENS:
        raise QtoolError(
            (Option("new", request.new_tokens), ": the first token belongs to the prompt"),
            kind="usage",
            hint=(Option("new", LEAST_NEW_TOKENS), " or more, better hundreds"),
        )
    subject = choose_subject(
        model=request.model,
        shape=request.shape or DEFAULT_SHAPE,
        precision=request.precision,
        head_precision=request.head_precision,
        device=request.device,
    )
    architecture = subject.step.model.architecture
    longest = architecture.max_context if architecture else None
    for size in request.sizes:
        size.check_context(longest, subject.label)
    if request.against is not None and subject.quant in QUANTIZED_PRECISIONS:
        require_bitsandbytes()
    warnings: list[str] = []
    on_event(Note(f"{subject.label} in {subject.quant} on {device}: {_task_text(request)}"))
    with interruptible():
        limit = measure_copy(device, on_event)
        _free_memory()
    _announce_length(subject, request, limit, on_event)
    taken: list[tuple[Subject, Samples]] = []
    interruption = gather(_take_all(subject, request, warnings, on_event), taken)
    samples = [found for of, found in taken if of is subject]
    fewer = [found for of, found in taken if of is not subject]
    runs = summarize(subject, samples, limit, fewer=fewer, warnings=warnings)
    on_gpu = device.type == "cuda"
    return GenerateBenchResult(
        device=device_name(torch.get_num_threads(), on_gpu=on_gpu),
        host=describe_host(),
        versions=software_versions(
            on_gpu=on_gpu, rivals=("torch", "transformers", *_rival_packages(runs))
        ),
        model=subject.label,
        quant=subject.quant,
        head_quant=request.head_precision,
        limit=limit,
        runs=tuple(runs),
        warnings=tuple(dict.fromkeys(warnings)),
        interruption=interruption,
    )


def _task_text(request: GenerateBenchRequest) -> str:
    sizes = "; ".join(size.text for size in request.sizes)
    return f"{sizes}; a run to warm up and {request.num_runs} that count"


def _announce_length(
    subject: Subject, request: GenerateBenchRequest, limit: Limit, on_event: OnEvent
) -> None:
    """Say what the bytes alone will take, if that is long; from then on runs tell more."""
    runs = (1 + request.num_runs) * request.num_engines
    step_bytes = sum(subject.step_bytes(size) * size.new_tokens for size in request.sizes)
    least_s = runs * step_bytes / limit.bytes_per_s
    if least_s > LONG_S:
        text = f"this takes at least {least_s:.0f} s: for new tokens, at the rate of a copy"
        on_event(Note(f"{text}; prompts come on top"))


def _take_all(
    subject: Subject, request: GenerateBenchRequest, warnings: list[str], on_event: OnEvent
) -> Iterator[tuple[Subject, Samples]]:
    """What the model shows, and then, where it is a part of one, a smaller part."""
    for each in filter(None, (subject, subject.with_fewer_layers())):
        for samples in _Turns(each, request, warnings).take(on_event):
            yield each, samples


def _free_memory() -> None:
    """Give back to the device what is no longer used; models and their graphs hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rival_packages(runs: list[GenerateRun]) -> tuple[str, ...]:
    is_there = any(run.engine == "transformers+bitsandbytes" for run in runs)
    return ("bitsandbytes",) if is_there else ()


# -- taking turns ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Player:
    """An engine with what it has shown so far."""

    engine: GenerateEngine
    allocated_peak_bytes: int
    timings: list[Timing] = field(default_factory=list)
    warm_up_s: float = 0.0

    def play(self, ids: Tensor, new_tokens: int) -> None:
        """Run once and keep the time."""
        timing = self.engine.run(ids, new_tokens)
        if timing.decode_s <= 0:  # a difference of two times, for some
            raise QtoolError(
                f"{self.engine.name} made {new_tokens} tokens in no more time than one",
                kind="usage",
                hint=("a larger ", Option("new")),
            )
        self.timings.append(timing)


class _Turns:
    """One model, loaded once; at each size qtool and its rival run in turns."""

    def __init__(
        self, subject: Subject, request: GenerateBenchRequest, warnings: list[str]
    ) -> None:
        self._subject = subject
        self._request = request
        self._warnings = warnings

    def take(self, on_event: OnEvent) -> Iterator[Samples]:
        """All sizes; one that does not fit the memory is a warning if others do."""
        has_some = False
        try:
            with self._subject.load(on_event) as loaded:
                on_event(Note(f"{self._subject.label} is ready after {loaded.load_s:.1f} s"))
                rival = self._share(loaded, on_event)
                for size in self._request.sizes:
                    try:
                        for samples in self._measure(loaded, rival, size, on_event):
                            yield samples
                            has_some = True
                    except QtoolError as error:
                        is_last = size == self._request.sizes[-1]
                        if error.kind != "memory" or (is_last and not has_some):
                            raise
                        self._warnings.append(f"{size.text} is not measured: {error.message}")
        finally:
            _free_memory()

    def _share(self, loaded: LoadedModel, on_event: OnEvent) -> Any | None:
        if self._request.against is None:
            return None
        if " + " in loaded.devices:
            self._warnings.append(
                f"transformers is not measured: the weights are spread over {loaded.devices}"
            )
            return None
        on_event(Note(f"loading {_rival_of(loaded)} over the same weights"))
        try:
            with quiet_bitsandbytes():
                return share_network(loaded.model)
        except ImportError as error:
            self._warnings.append(f"transformers + bitsandbytes is not measured: {error}")
            return None

    def _measure(
        self, loaded: LoadedModel, rival: Any | None, size: Size, on_event: OnEvent
    ) -> Iterator[Samples]:
        stage = f"measure {self._subject.label}, batch {size.batch}, {size.prompt_tokens} tokens"
        num_engines = 1 if rival is None else 2
        run_bytes = self._subject.step_bytes(size) * size.new_tokens
        total_bytes = (1 + self._request.num_runs) * num_engines * run_bytes
        on_event(Started(stage, total_bytes, is_transfer=False))
        ids = _random_prompts(loaded, size)
        with ExitStack() as closing, out_of_memory_as_error(f"running {size.text}"):
            players = list(self._warm_up(loaded, rival, size, ids, closing, on_event))
            self._announce_runs(players, on_event)
            for _ in range(self._request.num_runs):
                for player in random.sample(players, len(players)):
                    player.play(ids, size.new_tokens)
                    on_event(Advanced(run_bytes, player.engine.name))
        on_event(Finished(stage))
        for player in players:
            yield Samples(
                engine=player.engine.name,
                path=player.engine.path,
                path_reason=player.engine.path_reason,
                size=size,
                timings=tuple(player.timings),
                allocated_peak_bytes=player.allocated_peak_bytes,
            )

    def _announce_runs(self, players: list[_Player], on_event: OnEvent) -> None:
        """Say how long the runs that count will take, if that is long."""
        num_runs, each = self._request.num_runs, " of each" if len(players) > 1 else ""
        left_s = num_runs * sum(player.warm_up_s for player in players)
        announce(f"{num_runs} runs{each}", left_s, on_event)

    def _warm_up(
        self,
        loaded: LoadedModel,
        rival: Any | None,
        size: Size,
        ids: Tensor,
        closing: ExitStack,
        on_event: OnEvent,
    ) -> Iterator[_Player]:
        """Each runs once, the rival first: then nothing of qtool's but the weights is there, and
        the peak of the memory is each one's own."""
        step = Advanced(self._subject.step_bytes(size), "warm-up")
        rival_player = None
        if rival is not None:
            on_event(Note(f"warming up {_rival_of(loaded)}, {size.text}"))
            rival_player = self._warm_up_rival(loaded, rival, size, ids)
            on_event(step._replace(num_bytes=step.num_bytes * size.new_tokens))
        on_event(Note(f"warming up qtool, {size.text}"))
        memory = DeviceMemory(loaded.device)
        own = QtoolEngine(
            loaded, capacity=size.context, batch=size.batch, options=self._request.decoding
        )
        closing.callback(own.close)
        timing = own.run(ids, size.new_tokens, on_token=lambda: on_event(step))
        yield _Player(own, memory.allocated_peak_bytes(), warm_up_s=timing.seconds)
        if rival_player is not None:
            yield rival_player

    def _warm_up_rival(
        self, loaded: LoadedModel, network: Any, size: Size, ids: Tensor
    ) -> _Player | None:
        """A rival that fails is a warning."""
        name = _rival_of(loaded)
        engine = TransformersEngine(name, network)
        memory = DeviceMemory(loaded.device)
        try:
            timing = engine.run(ids, size.new_tokens)
        except Exception as error:  # whatever it raises is its own affair
            first_line = str(error).strip().partition("\n")[0]
            self._warnings.append(f"{name} is not measured at {size.text}: {first_line}")
            return None
        return _Player(engine, memory.allocated_peak_bytes(), warm_up_s=timing.seconds)


def _rival_of(loaded: LoadedModel) -> Engine:
    return "transformers" if loaded.num_packed_layers == 0 else "transformers+bitsandbytes"


def _random_prompts(loaded: LoadedModel, size: Size) -> Tensor:
    """int64 (batch, prompt_tokens), the same in every run."""
    vocab_size = loaded.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.prompt_tokens)
    return torch.randint(vocab_size, shape, generator=generator).to(loaded.device)
