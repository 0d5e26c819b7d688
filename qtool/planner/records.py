"""What the planner answers with. Sizes are bytes, contexts tokens, speeds tokens per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qtool.defaults import PREFILL_CHUNK
from qtool.formats.precisions import QuantizedPrecision
from qtool.planner.devices import Split
from qtool.planner.gpus import Gpu
from qtool.planner.kv_cache import KvDtype, Runtime

if TYPE_CHECKING:
    from qtool.planner.adapters import PlannedAdapter

# How a number is known: read from file headers; counted exactly from the config and the format;
# a closed form over the architecture; experience with other machines.
Basis = Literal["header", "exact", "formula", "heuristic"]
ComponentName = Literal[
    "weights",
    "kv_cache",
    "activations",
    "logits",
    "adapters",
    "gradients",
    "optimizer",
    "dequant_buffer",
    "workspace",
    "runtime_overhead",
    "allocator",
]
Verdict = Literal["yes", "tight", "no"]
Mode = Literal["generate", "qlora", "lora", "full"]
ModelSourceKind = Literal["headers", "config"]

# Components that the framework's allocator does not hand out.
OUTSIDE_ALLOCATOR: frozenset[ComponentName] = frozenset({"runtime_overhead", "allocator"})


class Component(NamedTuple):
    """One part of the memory in use at the moment of the peak."""

    bytes: int
    basis: Basis


class Suggestion(NamedTuple):
    """A change that lowers the peak: "nf4-dq", "context 8192 -> 5120", "gradient checkpointing"."""

    change: str
    saves_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """One GPU's answer to one plan.

    `max_context` is for the plan's batch and ends at the longest context the model was made for;
    `max_batch` is for the plan's context, `max_lora_r` for both. 0: not even one token, not even
    one sequence. None: nothing limits it, or there are no adapters. `notes` say what the runtime
    will do on that GPU.
    """

    gpu: Gpu
    usable_bytes: int
    verdict: Verdict
    max_context: int | None
    max_batch: int | None
    max_lora_r: int | None = None
    gpus: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a model is trained. `lora_targets` are module names, or None for all linear layers but
    the output head; the defaults are those of the command line."""

    lora_r: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.05
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the model, the same at every precision.

    `gpus` hold it together, as `split` says; the memory is that of the fullest one. qtool's own
    runtime takes a prompt up in chunks of `prefill_chunk` tokens and packs the output head in
    memory to `head_quant`; None leaves it as the model has it. With an `int8_threshold`, a number
    or the config's, its INT8 layers round the activations of prompts too.
    """

    context: int
    batch: int = 1
    mode: Mode = "generate"
    runtime: Runtime = "qtool"
    kv_dtype: KvDtype = "auto"
    gpus: int = 1
    split: Split = "pipeline"
    prefill_chunk: int = PREFILL_CHUNK
    head_quant: QuantizedPrecision | None = None
    int8_threshold: float | Literal["config"] | None = None
    adapter: PlannedAdapter | None = None
    tuning: Tuning = field(default_factory=Tuning)

    @property
    def is_own(self) -> bool:
        """Whether qtool itself generates: what only it knows counts nowhere else."""
        return self.mode == "generate" and self.runtime == "qtool"


class ExactRun(NamedTuple):
    """What running the real model under fake tensors allocated."""

    allocated_peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one model at one precision under a workload; per GPU, the fullest one.

    `components` are the parts live at the moment of the peak. `steady_bytes` is what stays between
    decode steps once the context is full, or between training steps, `load_peak_bytes` the most
    while weights are loaded, both with the runtime's overhead. `peak_low_bytes` and
    `peak_high_bytes` bound `peak_bytes`. `notes` say what the runtime does that one may not expect.
    `int8_threshold` is that of INT8 layers which round activations too, None where none do.
    """

    quant: str
    workload: Workload
    components: Mapping[ComponentName, Component]
    checkpoint_bytes: int
    steady_bytes: int
    load_peak_bytes: int
    peak_low_bytes: int
    peak_high_bytes: int
    suggestions: tuple[Suggestion, ...] = ()
    fits: tuple[Fit, ...] = ()
    notes: tuple[str, ...] = ()
    exact: ExactRun | None = None
    int8_threshold: float | None = None

    @property
    def allocated_peak_bytes(self) -> int:
        """What the framework's allocator hands out at the peak."""
        return sum(
            part.bytes for name, part in self.components.items() if name not in OUTSIDE_ALLOCATOR
        )

    @property
    def peak_bytes(self) -> int:
        """What the process takes from the GPU at the peak."""
        return sum(part.bytes for part in self.components.values())


class ModelFacts(NamedTuple):
    """The model that was planned.

    `parameters` counts tied weights once; `checkpoint_parameters` counts what the files store, None
    where there are none. `active_parameters` take part in one token's computation.
    `stored_precision` is how it is quantized already, None if it is not.
    """

    id: str
    revision: str | None
    architecture: str | None
    source: ModelSourceKind
    parameters: int
    active_parameters: int | None
    checkpoint_parameters: int | None
    max_context: int | None
    stored_precision: str | None = None


# From the one that loses least. float32 comes after 16 bit: it takes twice as much for nothing.
LEAST_LOSS: Final = ("bf16", "fp16", "fp32", "fp8", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")


def _loss(quant: str) -> int:
    return LEAST_LOSS.index(quant) if quant in LEAST_LOSS else 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """One model's plans, one per precision, and what the reader must know about them."""

    model: ModelFacts
    plans: tuple[MemoryPlan, ...]
    gpus: tuple[Gpu, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits_somewhere(self) -> bool:
        """Whether any plan is "yes" or "tight" on any GPU asked about."""
        return any(fit.verdict != "no" for plan in self.plans for fit in plan.fits)

    @property
    def best_quants(self) -> tuple[str | None, ...]:
        """Per GPU the precision that loses least of those planned that fit; None: none fits.

        As it is stored loses nothing; of two that lose nothing the smaller is as good.
        """
        stored = self.model.stored_precision
        by_loss = sorted(self.plans, key=lambda plan: (plan.quant != stored, _loss(plan.quant)))
        return tuple(
            next((plan.quant for plan in by_loss if plan.fits[index].verdict != "no"), None)
            for index in range(len(self.gpus))
        )


@dataclass(frozen=True, slots=True)
class SizingRow:
    """One model at one precision on one GPU (or any GPU of `vram_gib` GiB).

    `decode_tok_s_ceiling` is the GPU's bandwidth over the bytes that one token must read: no
    program can be faster; None where the bandwidth is not known. `notes` say what stands against
    the model there, whatever its memory.
    """

    gpu: Gpu
    vram_gib: float | None
    model: str
    quant: str
    verdict: Verdict
    peak_bytes: int
    usable_bytes: int
    max_context: int | None
    decode_tok_s_ceiling: float | None
    gpus: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizing:
    """All rows, and what the reader must know about them.

    `reference_models` says where each model of the guide comes from; empty for models the user
    named.
    """

    rows: tuple[SizingRow, ...]
    context: int | None
    workload: Workload
    reference_models: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def fits_somewhere(self) -> bool:
        """Whether any row is "yes" or "tight"."""
        return any(row.verdict != "no" for row in self.rows)
