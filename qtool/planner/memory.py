"""One plan: a model at one precision under a workload, component by component.

    budget = MemoryBudget.of(model, "nf4-dq", Workload(context=8192))
    budget.plan(budget.workload).peak_bytes

Generating peaks with a prompt that fills the context; decoding takes less.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

from qtool.architecture import Architecture
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.planner.activations import (
    NO_BUFFER,
    LayerShape,
    PrefillPeak,
    prefill_peak,
    spelled_out_peak,
)
from qtool.planner.demand import Demand, Parts
from qtool.planner.devices import Share, pipeline_shares, tensor_share
from qtool.planner.kv_cache import (
    VLLM_BATCHED_TOKENS,
    CacheLayers,
    KvDtype,
    dequantized_layer_bytes,
    kv_cache_bytes,
    overhang_bytes,
)
from qtool.planner.llm_int8 import outlier_share
from qtool.planner.model import PlannedModel
from qtool.planner.overhead import Overhead
from qtool.planner.own_runtime import OwnRuntime
from qtool.planner.records import Basis, Component, ComponentName, MemoryPlan, Workload
from qtool.planner.runtimes import check_mode, plan_notes, switching_tokens
from qtool.planner.weights import Weights

if TYPE_CHECKING:
    from qtool.planner.loading import Loading

QUANTIZED_CACHES: Final[frozenset[KvDtype]] = frozenset({"fp8", "int8"})


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A model at one precision on so many GPUs; `plan` fills in the workload.

    `workload` is the one it was made for: others may differ from it in context, batch and tuning.
    `layer` is None where only the weights are known, or no layer keeps a cache. `loading` is known
    where transformers loads a 16-bit checkpoint.
    """

    model: PlannedModel
    quant: str
    workload: Workload
    weights: Weights
    weights_basis: Basis
    activations_basis: Basis
    layer: LayerShape | None
    shares: tuple[Share, ...]
    loading: Loading | None = None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: PlannedModel, quant: str, workload: Workload) -> Self:
        """Raises QtoolError if the model cannot be planned at `quant`."""
        check_mode(quant, workload)
        architecture, runtime = model.architecture, workload.runtime
        if workload.adapter is not None and architecture is not None:
            workload.adapter.check_fits(architecture)
        head_quant = workload.head_quant if workload.is_own else None
        weights = model.weights(
            quant, runtime, head_quant, element_bytes=model.unpacked_bytes(workload)
        )
        layer = None
        if architecture is not None and architecture.cache_layers:
            layer = LayerShape.of(architecture)
        return cls(
            model=model,
            quant=quant,
            workload=workload,
            weights=weights,
            weights_basis=model.weights_basis(quant),
            activations_basis=_activations_basis(layer, workload),
            layer=layer,
            shares=_shares(weights, architecture, workload),
            loading=_loading(model, quant, weights, workload),
            notes=_notes(model, quant, workload, weights.element_bytes),
        )

    def on(self, workload: Workload) -> Self:
        """The same for another workload in the same mode and runtime, such as on more GPUs."""
        return replace(
            self,
            workload=workload,
            shares=_shares(self.weights, self.model.architecture, workload),
        )

    @property
    def max_context(self) -> int | None:
        """What the model was made for; None where that is not limited."""
        return self.model.architecture.max_context if self.model.architecture else None

    def plan(self, workload: Workload) -> MemoryPlan:
        """The memory that the workload takes."""
        demand, overhead = self._demand(workload), self._overhead(workload)
        own = self._own_runtime(workload)
        components: dict[ComponentName, Component] = dict(demand.parts)
        components["workspace"] = Component(overhead.workspace_bytes, "heuristic")
        components["runtime_overhead"] = Component(overhead.context_bytes, "heuristic")
        components["allocator"] = Component(
            overhead.allocator_bytes(demand.dynamic_bytes), "heuristic"
        )
        allocated_bytes = demand.total_bytes + overhead.workspace_bytes
        low_bytes, high_bytes = overhead.band(allocated_bytes, demand.dynamic_bytes)
        low_bytes -= demand.paged_bytes
        outside_bytes = overhead.workspace_bytes + overhead.context_bytes
        return MemoryPlan(
            quant=self.quant,
            workload=workload,
            components=components,
            checkpoint_bytes=self.weights.checkpoint_bytes,
            steady_bytes=demand.steady_bytes + outside_bytes,
            load_peak_bytes=self._load_peak_bytes() + overhead.context_bytes,
            peak_low_bytes=low_bytes,
            peak_high_bytes=high_bytes,
            notes=self.notes,
            int8_threshold=own.int8_threshold if own is not None else None,
        )

    def peak_bytes(self, workload: Workload) -> int:
        """`plan(...).peak_bytes` without the rest; grows with context, batch and LoRA rank."""
        demand, overhead = self._demand(workload), self._overhead(workload)
        fixed_bytes = overhead.workspace_bytes + overhead.context_bytes
        return fixed_bytes + demand.total_bytes + overhead.allocator_bytes(demand.dynamic_bytes)

    def needed_bytes(self, workload: Workload) -> int:
        """The same, or what loading takes where an output head shrinks only then, or a shorter text
        takes that grows past a length at which it is computed anew."""
        needed_bytes = self.peak_bytes(workload)
        if self.weights.more_before_bytes:
            loading_bytes = self._load_peak_bytes() + self._overhead(workload).context_bytes
            needed_bytes = max(needed_bytes, loading_bytes)
        switching = switching_tokens(self.model, workload)
        if switching is not None and switching < workload.context:
            growing_bytes = self.peak_bytes(replace(workload, context=switching))
            needed_bytes = max(needed_bytes, growing_bytes)
        return needed_bytes

    def kv_cache_bytes(self, workload: Workload) -> int:
        """The keys and values of full sequences, which decoding a token reads; 0 without layers."""
        return self._text_bytes(workload, self.layer.cache_layers) if self.layer else 0

    def _cache_bytes(self, workload: Workload, share: Share) -> int:
        """The cache as it is allocated for full sequences on one GPU; 0 without layers."""
        if self.layer is None:
            return 0
        own = self._own_runtime(workload)
        if own is None or workload.kv_dtype in QUANTIZED_CACHES:
            return self._text_bytes(workload, share.cache_layers)
        return own.cache_bytes(share.cache_layers, workload)

    def _text_bytes(self, workload: Workload, layers: CacheLayers) -> int:
        return kv_cache_bytes(
            layers,
            context=workload.context,
            batch=workload.batch,
            element_bytes=self.weights.element_bytes,
            kv_dtype=workload.kv_dtype,
            runtime=workload.runtime,
        )

    def _demand(self, workload: Workload) -> Demand:
        if workload.mode == "generate":
            demands = [self._share_demand(share, workload) for share in self.shares]
        else:
            demands = self._training_demands(workload)
        return max(demands, key=lambda demand: demand.total_bytes)

    def _share_demand(self, share: Share, workload: Workload) -> Demand:
        weights_bytes = self._resident_bytes(share)
        parts: dict[ComponentName, Component] = {
            "weights": Component(weights_bytes, self.weights_basis)
        }
        cache_bytes = self._cache_bytes(workload, share)
        read_back_bytes = self._read_back_bytes(workload, share)
        if self.layer is not None:
            parts["kv_cache"] = Component(cache_bytes, "exact")
            parts |= self._prompt_parts(self._prompt_peak(self.layer, workload))
            if switching_tokens(self.model, workload) == workload.context:
                parts |= self._anew_parts(self.layer, workload, share)
        own = self._own_runtime(workload)
        adapter_bytes = 0
        if own is not None and own.adapter is not None:
            adapter_bytes = int(share.part * own.adapter_bytes(workload))
            basis: Basis = "exact" if workload.gpus == 1 else "formula"
            parts["adapters"] = Component(adapter_bytes, basis)
        steady_bytes = weights_bytes + adapter_bytes + cache_bytes + read_back_bytes
        lies_there = own is not None and own.path != "eager"  # a cache of fixed capacity
        fixed_bytes = weights_bytes + adapter_bytes + lies_there * cache_bytes
        demand = Demand(parts, fixed_bytes, steady_bytes)
        if steady_bytes > demand.total_bytes:  # reading the cache back takes more than the prompt
            parts |= _decoding(read_back_bytes)
        return demand

    def _anew_parts(self, layer: LayerShape, workload: Workload, share: Share) -> Parts:
        """One token more, for which the whole text goes through again beside its old cache."""
        longer = replace(workload, context=workload.context + 1)
        old_bytes = self._cache_bytes(workload, share) + overhang_bytes(
            share.cache_layers,
            context=workload.context,
            batch=workload.batch,
            element_bytes=self.weights.element_bytes,
        )
        cache_bytes = old_bytes + self._cache_bytes(longer, share)
        parts = self._prompt_parts(self._prefill(layer, longer))
        return {**parts, "kv_cache": Component(cache_bytes, "exact")}

    def _training_demands(self, workload: Workload) -> list[Demand]:
        """One per GPU."""
        weights = [Component(self._resident_bytes(s), self.weights_basis) for s in self.shares]
        if self.model.architecture is None:
            return [Demand({"weights": held}, held.bytes, held.bytes) for held in weights]
        from qtool.planner.training_plan import training_demand, workload_peak  # only for training

        own_bytes = self._own_buffer_bytes(workload)
        peak = workload_peak(
            self.model,
            self.quant,
            workload,
            base_bytes=self.weights.element_bytes,
            buffer_bytes=own_bytes,
            int8_outliers=self._int8_outliers(workload.context * workload.batch),
        )
        return [
            training_demand(peak, weights=held, part=share.part)
            for held, share in zip(weights, self.shares, strict=True)
        ]

    def _own_buffer_bytes(self, workload: Workload) -> int | None:
        """What qtool's packed layers take beside a product; bitsandbytes' make a whole weight."""
        return self.weights.buffer.dequantizing_bytes if workload.runtime == "qtool" else None

    def _overhead(self, workload: Workload) -> Overhead:
        own = self._own_runtime(workload)
        return Overhead.of(workload, records_graph=own is not None and own.path == "graph")

    def _own_runtime(self, workload: Workload) -> OwnRuntime | None:
        """How qtool itself generates; None for other runtimes and modes."""
        architecture = self.model.architecture
        if not workload.is_own or architecture is None:
            return None
        return OwnRuntime.of(
            architecture, self.model.config, self.weights, workload, is_int8=self.quant == "int8"
        )

    def _prompt_peak(self, layer: LayerShape, workload: Workload) -> PrefillPeak:
        """What the prompts take beside the cache."""
        own = self._own_runtime(workload)
        return self._prefill(layer, workload) if own is None else own.prompt_peak(workload)

    def _prompt_parts(self, peak: PrefillPeak) -> Parts:
        return {
            "activations": Component(peak.activations_bytes, self.activations_basis),
            "logits": Component(peak.logits_bytes, "exact"),
            "dequant_buffer": Component(peak.dequant_buffer_bytes, "formula"),
        }

    def _prefill(self, layer: LayerShape, workload: Workload) -> PrefillPeak:
        """What one forward pass over the prompts allocates beside the cache."""
        weights = self.weights
        context, batch = workload.context, workload.batch
        if workload.runtime == "vllm":  # prompts go through in pieces
            context, batch = min(context * batch, VLLM_BATCHED_TOKENS), 1
            layer = layer.always_fused()
        num_parts = workload.gpus if workload.split == "tensor" else 1
        if num_parts > 1:
            layer, buffer = layer.cut(num_parts), weights.buffer.cut(num_parts)
        else:
            buffer = weights.buffer
        converts = weights.buffer != NO_BUFFER and weights.compute_bytes != weights.element_bytes
        peak = prefill_peak(
            layer,
            context=context,
            batch=batch,
            element_bytes=weights.element_bytes,
            buffer=buffer,
            converted_bytes=weights.compute_bytes if converts else 0,
            int8_outliers=self._int8_outliers(context * batch),
        )
        if not weights.are_float32:
            return peak
        attention = spelled_out_peak(layer, tokens=context, batch=batch)
        return max(peak, attention, key=lambda moment: moment.total_bytes)

    def _int8_outliers(self, num_tokens: int) -> float | None:
        """The share of outlier columns where bitsandbytes' INT8 layers multiply, else None."""
        architecture = self.model.architecture
        if self.quant != "int8" or self.workload.runtime == "qtool" or architecture is None:
            return None
        return outlier_share(architecture.hidden_size, num_tokens, self.model.config)

    def _read_back_bytes(self, workload: Workload, share: Share) -> int:
        """What a decode step with a quantized cache turns back at once."""
        if workload.kv_dtype not in QUANTIZED_CACHES or workload.runtime == "vllm":
            return 0
        return dequantized_layer_bytes(
            share.cache_layers,
            context=workload.context,
            batch=workload.batch,
            element_bytes=self.weights.element_bytes,
        )

    def _resident_bytes(self, share: Share) -> int:
        """The share's weights as the allocator hands them out."""
        if self.loading is None or len(self.shares) > 1:
            return share.weights_bytes
        return self.loading.allocated_bytes

    def _load_peak_bytes(self) -> int:
        if self.loading is not None and len(self.shares) == 1:
            return self.loading.peak_bytes
        last_bytes = self.shares[-1].weights_bytes + self.weights.more_before_bytes
        own = self._own_runtime(self.workload)
        adapter_bytes = 0 if own is None else own.adapter_loading_bytes()
        return max(
            last_bytes,
            *(share.weights_bytes + int(share.part * adapter_bytes) for share in self.shares),
        )


def _notes(
    model: PlannedModel, quant: str, workload: Workload, element_bytes: int
) -> tuple[str, ...]:
    notes = plan_notes(model, quant, workload)
    if workload.is_own and workload.adapter is not None:
        notes = (*notes, *workload.adapter.notes())
    if workload.mode == "generate" or model.architecture is None:
        return notes
    from qtool.planner.training_plan import training_notes

    return (*notes, *training_notes(model, quant, workload, element_bytes))


def _decoding(read_back_bytes: int) -> Parts:
    """What a decode step takes beside the cache."""
    return {
        "activations": Component(read_back_bytes, "formula"),
        "logits": Component(0, "exact"),
        "dequant_buffer": Component(0, "formula"),
    }


def _shares(
    weights: Weights, architecture: Architecture | None, workload: Workload
) -> tuple[Share, ...]:
    layers = architecture.cache_layers if architecture else ()
    if workload.gpus == 1 or architecture is None:
        return (Share(weights.device_bytes, Counter(layers)),)
    if workload.split == "tensor":
        counted = Counter(layers)
        return (tensor_share(weights.device_bytes, weights.split_bytes, counted, workload.gpus),)
    shares = pipeline_shares(weights.place_bytes, layers, architecture.num_layers, workload.gpus)
    return tuple(share for share in shares if share.part)  # with fewer layers than GPUs some idle


def _activations_basis(layer: LayerShape | None, workload: Workload) -> Basis:
    return layer.basis if layer is not None and workload.runtime != "vllm" else "heuristic"


def _loading(
    model: PlannedModel, quant: str, weights: Weights, workload: Workload
) -> Loading | None:
    """How transformers loads a 16-bit checkpoint; None for other runtimes and checkpoints."""
    if workload.runtime != "transformers" or model.architecture is None or model.packed:
        return None
    if model.stored_format is not None or weights.element_bytes not in (2, 4):
        return None
    from qtool.planner.loading import load_with_transformers  # only this runtime pays for it

    fmt = next((QuantFormat(known) for known in QUANTIZED_PRECISIONS if known == quant), None)
    packed = model.packable() if fmt else ()
    return load_with_transformers(model.architecture, packed, fmt, weights.element_bytes)
