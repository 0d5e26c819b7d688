"""One plan: a model at one precision, context and batch, component by component.

    budget = MemoryBudget.of(model, "nf4-dq", kv_dtype="auto")
    budget.plan(context=8192, batch=1).peak_bytes

The peak is that of a prompt which fills the context in one forward pass; decoding takes less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

from qtool.planner.activations import NO_BUFFER, LayerShape, PrefillPeak, prefill_peak
from qtool.planner.kv_cache import kv_cache_bytes
from qtool.planner.model import PlannedModel
from qtool.planner.overhead import CONTEXT_BYTES, WORKSPACE_BYTES, allocator_bytes, peak_band
from qtool.planner.records import Basis, Component, ComponentName, MemoryPlan
from qtool.planner.weights import Weights

KvDtype = Literal["auto", "bf16"]
KV_DTYPE_BYTES: Final = {"bf16": 2}


@dataclass(frozen=True, slots=True)
class _WorkingSet:
    """What comes and goes: the cache, and what a forward pass over the prompt allocates."""

    kv_cache_bytes: int
    peak: PrefillPeak

    @property
    def total_bytes(self) -> int:
        return self.kv_cache_bytes + self.peak.total_bytes

    def components(self, activations_basis: Basis) -> dict[ComponentName, Component]:
        return {
            "kv_cache": Component(self.kv_cache_bytes, "exact"),
            "activations": Component(self.peak.activations_bytes, activations_basis),
            "logits": Component(self.peak.logits_bytes, "exact"),
            "dequant_buffer": Component(self.peak.dequant_buffer_bytes, "formula"),
        }


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A model at one precision; `plan` fills in context and batch.

    `layer` is None where only the weights are known, or there is no attention. `max_context` is
    what the model was made for, None where that is not limited.
    """

    quant: str
    weights: Weights
    weights_basis: Basis
    activations_basis: Basis
    layer: LayerShape | None
    max_context: int | None
    kv_element_bytes: int

    @classmethod
    def of(cls, model: PlannedModel, quant: str, kv_dtype: KvDtype = "auto") -> Self:
        """Raises QtoolError if the model cannot be planned at `quant`."""
        weights, architecture = model.weights(quant), model.architecture
        has_attention = architecture is not None and bool(architecture.cache_layers)
        return cls(
            quant=quant,
            weights=weights,
            weights_basis="header" if model.source == "headers" else "exact",
            activations_basis="heuristic"
            if architecture and architecture.unmodelled
            else "formula",
            layer=LayerShape.of(architecture) if architecture and has_attention else None,
            max_context=architecture.max_context if architecture else None,
            kv_element_bytes=KV_DTYPE_BYTES.get(kv_dtype, weights.element_bytes),
        )

    def plan(self, *, context: int, batch: int) -> MemoryPlan:
        """The memory for `batch` sequences of `context` tokens."""
        working_set = self._working_set(context, batch)
        dynamic_bytes = working_set.total_bytes if working_set else 0
        components: dict[ComponentName, Component] = {}
        components["weights"] = Component(self.weights.device_bytes, self.weights_basis)
        if working_set:
            components |= working_set.components(self.activations_basis)
        components["workspace"] = Component(WORKSPACE_BYTES, "heuristic")
        components["runtime_overhead"] = Component(CONTEXT_BYTES, "heuristic")
        components["allocator"] = Component(allocator_bytes(dynamic_bytes), "heuristic")
        allocated_bytes = self.weights.device_bytes + dynamic_bytes + WORKSPACE_BYTES
        low_bytes, high_bytes = peak_band(allocated_bytes, dynamic_bytes)
        return MemoryPlan(
            quant=self.quant,
            context=context,
            batch=batch,
            components=components,
            checkpoint_bytes=self.weights.checkpoint_bytes,
            steady_bytes=self._steady_bytes(context, batch),
            load_peak_bytes=self.weights.device_bytes + CONTEXT_BYTES,
            peak_low_bytes=low_bytes,
            peak_high_bytes=high_bytes,
        )

    def peak_bytes(self, *, context: int, batch: int) -> int:
        """`plan(...).peak_bytes` without the rest; grows with context and with batch."""
        working_set = self._working_set(context, batch)
        dynamic_bytes = working_set.total_bytes if working_set else 0
        fixed_bytes = self.weights.device_bytes + WORKSPACE_BYTES + CONTEXT_BYTES
        return fixed_bytes + dynamic_bytes + allocator_bytes(dynamic_bytes)

    def kv_cache_bytes(self, *, context: int, batch: int) -> int:
        """The cache of `batch` full sequences; 0 where the layers are not known."""
        if self.layer is None:
            return 0
        return kv_cache_bytes(
            self.layer.cache_layers,
            context=context,
            batch=batch,
            element_bytes=self.kv_element_bytes,
        )

    def _working_set(self, context: int, batch: int) -> _WorkingSet | None:
        if self.layer is None:
            return None
        weights = self.weights
        converts = weights.buffer != NO_BUFFER and weights.compute_bytes != weights.element_bytes
        peak = prefill_peak(
            self.layer,
            context=context,
            batch=batch,
            element_bytes=weights.element_bytes,
            buffer=weights.buffer,
            converted_bytes=weights.compute_bytes if converts else 0,
        )
        return _WorkingSet(self.kv_cache_bytes(context=context, batch=batch), peak)

    def _steady_bytes(self, context: int, batch: int) -> int:
        cache_bytes = self.kv_cache_bytes(context=context, batch=batch)
        return self.weights.device_bytes + cache_bytes + WORKSPACE_BYTES + CONTEXT_BYTES
