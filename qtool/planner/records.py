"""What the planner answers with. Sizes are bytes, contexts tokens, speeds tokens per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qtool.planner.gpus import Gpu

# How a number is known: read from file headers; counted exactly from the config and the format;
# a closed form over the architecture; experience with other machines.
Basis = Literal["header", "exact", "formula", "heuristic"]
ComponentName = Literal[
    "weights",
    "kv_cache",
    "activations",
    "logits",
    "dequant_buffer",
    "workspace",
    "runtime_overhead",
    "allocator",
]
Verdict = Literal["yes", "tight", "no"]
ModelSourceKind = Literal["headers", "config"]

# Components that the framework's allocator does not hand out.
OUTSIDE_ALLOCATOR: frozenset[ComponentName] = frozenset({"runtime_overhead", "allocator"})


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the memory in use at the moment of the peak."""

    bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change that lowers the peak: "nf4-dq", "context 8192 -> 5120", "batch 8 -> 3"."""

    change: str
    saves_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """One GPU's answer to one plan.

    `max_context` is for the plan's batch and ends at the longest context the model was made for;
    `max_batch` is for the plan's context. 0: not even one token, not even one sequence. None:
    nothing limits it.
    """

    gpu: Gpu
    usable_bytes: int
    verdict: Verdict
    max_context: int | None
    max_batch: int | None
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one model at one precision, context and batch.

    `components` are the parts live at the moment of the peak. `steady_bytes` is what stays between
    decode steps once the context is full, `load_peak_bytes` the most while weights are loaded,
    both with the runtime's overhead. `peak_low_bytes` and `peak_high_bytes` bound `peak_bytes`.
    """

    quant: str
    context: int
    batch: int
    components: Mapping[ComponentName, Component]
    checkpoint_bytes: int
    steady_bytes: int
    load_peak_bytes: int
    peak_low_bytes: int
    peak_high_bytes: int
    suggestions: tuple[Suggestion, ...] = ()
    fits: tuple[Fit, ...] = ()
    mode: str = "generate"
    runtime: str = "qtool"

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


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that was planned.

    `parameters` counts tied weights once; `checkpoint_parameters` counts what the files store, None
    where there are none. `active_parameters` take part in one token's computation.
    """

    id: str
    revision: str | None
    architecture: str | None
    source: ModelSourceKind
    parameters: int
    active_parameters: int | None
    checkpoint_parameters: int | None
    max_context: int | None


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


@dataclass(frozen=True, slots=True)
class SizingRow:
    """One model at one precision on one GPU (or any GPU of `vram_gib` GiB).

    `decode_tok_s_ceiling` is the GPU's bandwidth over the bytes that one token must read: no
    program can be faster; None where the bandwidth is not known.
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


@dataclass(frozen=True, slots=True)
class Sizing:
    """All rows, and what the reader must know about them.

    `reference_models` says where each model of the guide comes from; empty for models the user
    named.
    """

    rows: tuple[SizingRow, ...]
    context: int | None
    batch: int
    reference_models: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def fits_somewhere(self) -> bool:
        """Whether any row is "yes" or "tight"."""
        return any(row.verdict != "no" for row in self.rows)
