"""What qtool's own runtime takes to generate: the path that it goes, its cache, a prompt in chunks.

The paths are those of `qtool/runtime/decoders` on a GPU; tests hold this module against them:

    fused   the common block on qtool's kernels, over a cache of fixed capacity
    graph   transformers' own operations, over the same cache
    eager   the same over buffers that double, where no graph can be made

A prompt goes through in chunks, and only its last position has logits. A decoded token takes less
than a chunk. On the fused path, in elements per token of a chunk, with W for the weight that is
dequantized to multiply by it (the last h + q are the hidden state and what attention made before):

    query, key, value   h + (q + 2*kv) + h + q, and W of all three
    attention           h + (q + 2*kv) + 2*q + h + q, and a float32 per head
    gate and up         h + 2*i + h + q, and W of one
    down                h + i + h + q, and W

An adapter's inner values lie beside the same results once W is gone.

Where activations are rounded to INT8 too, what `rounded_products` says stands for W. A GPU of
Hopper reads packed weights for some thousand tokens, and needs W only for the few tokens that are
compared before the first prompt; a plan is for any GPU.

The other paths are `qtool.planner.activations`, for a chunk that looks at a longer cache. In
float32 the first chunk may take more than the last, which has a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple, Self

from qtool.architecture import Architecture, AttentionCache, CacheLayer
from qtool.planner.activations import (
    NO_BUFFER,
    DequantBuffer,
    LayerShape,
    PrefillPeak,
    prefill_peak,
    spelled_out_peak,
)
from qtool.planner.adapters import PlannedAdapter
from qtool.planner.kv_cache import CacheLayers, cached_tokens, kv_cache_bytes
from qtool.planner.records import Workload
from qtool.planner.rounded_products import RoundedProducts
from qtool.planner.units import FLOAT32_BYTES, HALF_BYTES
from qtool.planner.weights import Weights, piece_rows

Path = Literal["fused", "graph", "eager"]

CAPACITY_STEP: Final = 64  # capacities are multiples of it
# Types for which transformers has no fixed cache that a graph could use.
EAGER_TYPES: Final = frozenset(
    {"deepseek_v32", "deepseek_v4", "falcon_mamba", "glm_moe_dsa", "mamba"}
)
# Types whose states take a prompt whole.
WHOLE_TYPES: Final = frozenset({"deepseek_v32", "falcon_mamba", "glm_moe_dsa", "jamba", "mamba"})
# Rotary frequencies that depend on the length of the text, so that a long prompt is run whole.
LENGTH_DEPENDENT_ROTARY: Final = frozenset({"longrope", "dynamic"})

# What the fused kernels take; a refused block goes the graph path. Of more columns, all of which a
# norm needs at once, one thread block does not hold the activations.
LARGEST_FUSED_HIDDEN: Final = 14_336
FUSED_TYPES: Final = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
# Whose scores are capped, unless the config says otherwise.
CAPPED_TYPES: Final = frozenset({"gemma2"})
FUSED_BATCH: Final = 8
FUSED_ROTARY: Final = frozenset({"default", "linear", "llama3", "yarn"})
FUSED_COLUMNS: Final = 64  # rows of a weight are whole groups of so many
LARGEST_GROUP: Final = 16
LARGEST_HEAD_DIM: Final = 256

FEW_TOKENS: Final = 64  # up to so many, products read packed bytes
# Of the largest GPUs: as many blocks, or one for each key head, share the attention of one token.
MULTIPROCESSORS: Final = 148
INT64_BYTES: Final = 8
DEFAULT_INT8_THRESHOLD: Final = 6.0  # bitsandbytes' own, and what `qtool quantize` writes
# Logits of a graph are compared with those of the operations that it was recorded from: three of
# each in float32, a difference and its absolute values.
COMPARED_LOGIT_BYTES: Final = 8 * FLOAT32_BYTES
# transformers' angles of some positions at a time, before half of them are kept: frequencies (half
# as wide), angles, cosines, and sines before and after they are scaled, all float32.
ANGLE_COPIES: Final = 4.5
ANGLE_POSITIONS: Final = 8192


class Chunk(NamedTuple):
    """So many tokens of each of `batch` sequences, in a context of `context`."""

    tokens: int
    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """The widths of the common block, in elements: `layers` are the rows of query, key and value,
    one number where they are one layer. `num_angles`: for how many kinds of layers there are
    rotary angles. `adds_norms`: what is added to the hidden state is normed before."""

    hidden: int
    heads: int
    head_dim: int
    kv: int
    mlp: int
    layers: tuple[int, ...]
    is_packed: bool
    num_angles: int
    adds_norms: bool
    caps_scores: bool

    @classmethod
    def of(
        cls, architecture: Architecture, config: Mapping[str, Any], weights: Weights
    ) -> Self | None:
        """None where the kernels do not take the model's blocks."""
        cached = set(architecture.cache_layers)
        if architecture.model_type not in FUSED_TYPES or not cached:
            return None
        caches = [layer for layer in cached if isinstance(layer, AttentionCache)]
        heads, hidden = architecture.num_attention_heads, architecture.hidden_size
        head_dim, kv_heads = caches[0].head_dim, caches[0].num_kv_heads
        queries, kv = heads * head_dim, kv_heads * head_dim
        takes = (
            (weights.element_bytes, weights.compute_bytes) == (HALF_BYTES, HALF_BYTES)
            and rotary_type(config) in FUSED_ROTARY
            and heads % kv_heads == 0
            and heads // kv_heads <= LARGEST_GROUP
            and head_dim % 8 == 0
            and head_dim <= LARGEST_HEAD_DIM
            and hidden <= LARGEST_FUSED_HIDDEN
            and not _text_config(config).get("use_bidirectional_attention")
            and not any(
                n % FUSED_COLUMNS for n in (hidden, queries, architecture.intermediate_size)
            )
        )
        if not takes:
            return None
        is_joined, adds_norms = (
            any(name.endswith(f"{part}.weight") for name in architecture.tensors)
            for part in ("qkv_proj", "post_feedforward_layernorm")
        )
        return cls(
            hidden=hidden,
            heads=heads,
            head_dim=head_dim,
            kv=kv,
            mlp=architecture.intermediate_size,
            layers=(queries + 2 * kv,) if is_joined else (queries, kv, kv),
            is_packed=weights.buffer != NO_BUFFER,
            num_angles=_num_angles(architecture, config),
            adds_norms=adds_norms,
            caps_scores=_caps_scores(architecture, config),
        )

    def held_bytes(self, batch: int, capacity: int) -> int:
        """What lies there between steps: one token's states, angles, results of attention."""
        states = (1 + self.adds_norms) * self.hidden
        states += sum(self.layers) + self.heads * self.head_dim + self.mlp
        kv_heads = self.kv // self.head_dim
        blocks = max(MULTIPROCESSORS, batch * kv_heads)
        results = blocks * (self.heads // kv_heads) * (self.head_dim + 2)
        angles = self.num_angles * capacity * self.head_dim
        return batch * states * HALF_BYTES + (results + angles) * FLOAT32_BYTES

    def moments(
        self,
        tokens: int,
        rounding: RoundedProducts | None,
        inner: Mapping[int, int] | None = None,
    ) -> Iterator[PrefillPeak]:
        """Of `tokens` that go through at once.

        Args:
            rounding: whether activations are rounded too.
            inner: an adapter's inner values for each input of a block, see `PlannedAdapter`.
        """
        queries = self.heads * self.head_dim
        states = 2 * self.hidden  # before and after the norm
        sums_bytes = tokens * self.heads * FLOAT32_BYTES

        def moment(
            elements: int, *layers: int, columns: int = 0, more_bytes: int = 0
        ) -> PrefillPeak:
            num_bytes = tokens * (states + elements) * HALF_BYTES + more_bytes
            if layers and rounding is not None and tokens > FEW_TOKENS:
                num_bytes += rounding.bytes_at_once(tokens, columns, layers)
                return PrefillPeak(num_bytes, 0, 0)
            reads_packed = self.is_packed and tokens <= FEW_TOKENS
            weight_bytes = 0 if reads_packed else self._weight_bytes(layers, columns)
            return PrefillPeak(num_bytes, weight_bytes, 0)

        yield moment(sum(self.layers), *self.layers, columns=self.hidden)
        yield moment(sum(self.layers) + 2 * queries, more_bytes=sums_bytes)
        yield moment(2 * self.mlp, self.mlp, columns=self.hidden)
        yield moment(self.mlp, self.hidden, columns=self.mlp)
        beside = (sum(self.layers), queries, 2 * self.mlp, self.mlp)
        for place, rows in (inner or {}).items():
            yield moment(beside[place] + rows)

    def _weight_bytes(self, layers: Sequence[int], columns: int) -> int:
        """The scratch that layers of so many rows are dequantized into, one group of pieces after
        the other. A weight that is not packed is copied only where several make a group."""
        groups: list[list[int]] = []
        for piece in (rows for layer in layers for rows in piece_rows(layer, columns)):
            most = piece_rows(sum(layers), columns)[0]
            if groups and sum(groups[-1]) + piece <= most:
                groups[-1].append(piece)
            else:
                groups.append([piece])
        sizes = [sum(group) for group in groups if self.is_packed or len(group) > 1]
        return max(sizes, default=0) * columns * HALF_BYTES


@dataclass(frozen=True, slots=True)
class OwnRuntime:
    """A model on its path.

    `fused` is None where another path is gone. `short_context`: up to which rotary frequencies are
    the same, None if they always are. `int8_threshold`: of products with packed weights for which
    activations are rounded too, None where they are not. `adapter`: what runs beside the layers.
    """

    path: Path
    layer: LayerShape
    weights: Weights
    fused: FusedBlock | None
    short_context: int | None
    takes_chunks: bool
    int8_threshold: float | None = None
    adapter: PlannedAdapter | None = None

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        config: Mapping[str, Any],
        weights: Weights,
        workload: Workload,
        *,
        is_int8: bool = False,
    ) -> Self:
        """The path that the runtime goes for the workload's batch and GPUs.

        Args:
            is_int8: what is packed are INT8 rows.
        """
        num_parts = workload.gpus if workload.split == "tensor" else 1
        layer = LayerShape.of(architecture)
        adapter = workload.adapter
        fused = None
        if adapter is None or adapter.is_plain:
            fused = FusedBlock.of(architecture, config, weights)
        path: Path = "graph"
        if workload.gpus > 1 or architecture.model_type in EAGER_TYPES:
            path = "eager"
        elif fused is not None and workload.batch <= FUSED_BATCH:
            path = "fused"
        is_short_only = rotary_type(config) in LENGTH_DEPENDENT_ROTARY
        return cls(
            path=path,
            layer=layer.cut(num_parts) if num_parts > 1 else layer,
            weights=replace(weights, buffer=weights.buffer.cut(num_parts)),
            fused=fused if path == "fused" else None,
            short_context=_original_context(config) if is_short_only else None,
            takes_chunks=architecture.model_type not in WHOLE_TYPES,
            int8_threshold=_threshold(config, weights, workload) if is_int8 else None,
            adapter=adapter,
        )

    @property
    def rounding(self) -> RoundedProducts | None:
        """What such products take."""
        if self.int8_threshold is None:
            return None
        return RoundedProducts(has_outliers=self.int8_threshold != 0)

    def adapter_bytes(self, workload: Workload) -> int:
        """What the adapter takes all the time, on all GPUs together; 0 without one."""
        if self.adapter is None:
            return 0
        element_bytes = self.weights.element_bytes
        held_bytes = self.adapter.held_bytes(element_bytes)
        if self.path != "fused":
            return held_bytes
        return held_bytes + self.adapter.copies_bytes(workload.batch, element_bytes)

    def adapter_loading_bytes(self) -> int:
        """What it takes while it is loaded: the file's tensors beside PEFT's."""
        if self.adapter is None:
            return 0
        return self.adapter.held_bytes(self.weights.element_bytes) + self.adapter.file_bytes

    def cache_bytes(self, layers: CacheLayers, workload: Workload) -> int:
        """Keys and values of `layers` as they are allocated for the workload's context."""
        growing = self.path == "eager"
        held: Counter[CacheLayer] = Counter()
        windows: Counter[CacheLayer] = Counter()
        for layer, count in layers.items():
            if growing and isinstance(layer, AttentionCache) and layer.window is not None:
                windows[layer] += count
            else:
                held[_without_window(layer)] += count
        context = workload.context
        if growing:
            room = grown_tokens(context, self._chunk(workload).tokens)
        else:
            room = fixed_tokens(context)
        return sum(
            kv_cache_bytes(
                part,
                context=tokens,
                batch=workload.batch,
                element_bytes=self.weights.element_bytes,
                kv_dtype=workload.kv_dtype,
            )
            for part, tokens in ((held, room), (windows, context))
        )

    def prompt_peak(self, workload: Workload) -> PrefillPeak:
        """What a prompt that fills the context takes beside the cache, at its largest moment."""
        return max(self._moments(workload), key=lambda moment: moment.total_bytes)

    def _moments(self, workload: Workload) -> Iterator[PrefillPeak]:
        """All with what is held meanwhile."""
        batch, capacity = workload.batch, fixed_tokens(workload.context)
        held_bytes = batch * workload.context * INT64_BYTES  # the tokens
        logit_bytes = batch * self.layer.vocabulary * self.weights.element_bytes
        if self.fused is not None:
            held_bytes += self.fused.held_bytes(batch, capacity)
            angles = ANGLE_COPIES * min(capacity, ANGLE_POSITIONS) * self.fused.head_dim
            yield PrefillPeak(held_bytes + int(angles * FLOAT32_BYTES), 0, logit_bytes)
        step_logits = 0 if self.path == "eager" else logit_bytes  # which a graph makes again
        if self.path != "eager":
            compared = batch * self.layer.vocabulary * COMPARED_LOGIT_BYTES
            yield PrefillPeak(held_bytes, 0, step_logits + compared)
        for moment in self._prompt_moments(workload):
            yield PrefillPeak(
                held_bytes + moment.activations_bytes,
                moment.dequant_buffer_bytes,
                step_logits + moment.logits_bytes,
            )

    def _prompt_moments(self, workload: Workload) -> Iterator[PrefillPeak]:
        chunk = self._chunk(workload)
        few = workload.batch * workload.context <= FEW_TOKENS
        if self.fused is not None and not self.fused.caps_scores and not few:
            tokens = workload.batch * min(workload.prefill_chunk, workload.context)
            inner = None if self.adapter is None else self.adapter.inner_rows()
            yield from self.fused.moments(tokens, self.rounding, inner)
            return
        yield self._operations_peak(chunk)
        if self.weights.are_float32:
            yield from self._spelled_out_moments(chunk)
        if self.adapter is not None and self.adapter.layers:
            yield self._adapted_peak(chunk, self.adapter)
        yield self._head_peak(chunk)

    def _operations_peak(self, chunk: Chunk) -> PrefillPeak:
        """A chunk through transformers' own operations, the last of its prompt."""
        weights = self.weights
        reads_packed = chunk.batch * chunk.tokens <= FEW_TOKENS
        reads_packed &= weights.compute_bytes == HALF_BYTES
        buffer = weights.buffer if self.rounding is None else self._rounding_buffer(chunk)
        return self._operations_beside(chunk, NO_BUFFER if reads_packed else buffer)

    def _spelled_out_moments(self, chunk: Chunk) -> Iterator[PrefillPeak]:
        """The first chunk's, and those of a decoded token where the cache grows: a graph's has a
        mask."""
        yield spelled_out_peak(self.layer, tokens=chunk.tokens, batch=chunk.batch)
        if self.path == "eager":
            yield spelled_out_peak(self.layer, tokens=1, batch=chunk.batch, keys=chunk.context)

    def _adapted_peak(self, chunk: Chunk, adapter: PlannedAdapter) -> PrefillPeak:
        """The same where PEFT's layers add to what a product made: nothing is dequantized then."""
        tokens, element_bytes = chunk.batch * chunk.tokens, self.weights.element_bytes
        first, others = 0, 0
        for layer in adapter.layers:
            beside = layer.beside_product_bytes(tokens, element_bytes, is_dora=adapter.is_dora)
            if layer.rows >= self.layer.mlp > layer.columns:
                first = max(first, beside)
            else:
                others = max(others, beside + tokens * layer.rows * element_bytes)
        peak = self._operations_beside(chunk, DequantBuffer(others, first))
        all_bytes = peak.activations_bytes + peak.dequant_buffer_bytes
        return PrefillPeak(all_bytes, 0, peak.logits_bytes)

    def _operations_beside(self, chunk: Chunk, buffer: DequantBuffer) -> PrefillPeak:
        """A chunk through transformers' own operations, beside what its products take."""
        weights, is_fixed = self.weights, self.path != "eager"
        converts = weights.buffer != NO_BUFFER and weights.compute_bytes != weights.element_bytes
        capacity = fixed_tokens(chunk.context) if is_fixed else chunk.context
        windows = [it.window for it in self.layer.cache_layers if isinstance(it, AttentionCache)]
        hides = is_fixed and any(window and window <= capacity for window in windows)
        peak = prefill_peak(
            self.layer,
            context=chunk.tokens,
            batch=chunk.batch,
            element_bytes=weights.element_bytes,
            buffer=buffer,
            converted_bytes=weights.compute_bytes if converts else 0,
            keys=capacity if hides or chunk.tokens < chunk.context else None,
        )
        return replace(peak, activations_bytes=peak.activations_bytes + self._tail_bytes(chunk))

    def _rounding_buffer(self, chunk: Chunk) -> DequantBuffer:
        """What the MLP's products take in the place of a dequantized weight: the first ones beside
        most of its results, the last beside its own input alone."""
        assert self.rounding is not None
        tokens, layer = chunk.batch * chunk.tokens, self.layer
        first = self.rounding.bytes_in_pieces(tokens, layer.hidden, layer.mlp)
        last = self.rounding.bytes_in_pieces(tokens, layer.mlp, layer.hidden)
        return DequantBuffer(max(first, last), first)

    def _head_peak(self, chunk: Chunk) -> PrefillPeak:
        """Multiplying by a head that is packed in memory: as many rows as there are sequences."""
        weights = self.weights
        reads_packed = chunk.batch <= FEW_TOKENS and weights.element_bytes == HALF_BYTES
        buffer_bytes = 0 if reads_packed else weights.head_buffer_bytes
        states_bytes = chunk.batch * chunk.tokens * self.layer.hidden * weights.element_bytes
        logit_bytes = chunk.batch * self.layer.vocabulary * weights.element_bytes
        return PrefillPeak(states_bytes, buffer_bytes, logit_bytes)

    def _tail_bytes(self, chunk: Chunk) -> int:
        """What sliding layers of a growing cache hold of the last chunk beside their windows."""
        if self.path != "eager" or chunk.tokens == chunk.context:
            return 0
        sliding = Counter(
            {
                _without_window(layer): count
                for layer, count in self.layer.cache_layers.items()
                if cached_tokens(layer, chunk.context) < chunk.context
            }
        )
        return kv_cache_bytes(
            sliding,
            context=chunk.tokens,
            batch=chunk.batch,
            element_bytes=self.weights.element_bytes,
        )

    def _chunk(self, workload: Workload) -> Chunk:
        context = workload.context
        is_long = self.short_context is not None and context > self.short_context
        whole = is_long or not self.takes_chunks
        tokens = context if whole else min(workload.prefill_chunk, context)
        return Chunk(tokens, workload.batch, context)


def _threshold(config: Mapping[str, Any], weights: Weights, workload: Workload) -> float | None:
    """None where activations stay as they are: a GPU rounds them in 16 bit only."""
    threshold = workload.int8_threshold
    if threshold is None or weights.compute_bytes != HALF_BYTES:
        return None
    if threshold == "config":
        entry = config.get("quantization_config")
        found = entry.get("llm_int8_threshold") if isinstance(entry, Mapping) else None
        threshold = DEFAULT_INT8_THRESHOLD if found is None else found
    return threshold


def _num_angles(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Kinds of layers by windows, and those that turn nothing: every fourth of SmolLM3's."""
    layers = architecture.cache_layers
    kinds = [isinstance(layer, AttentionCache) and layer.window is None for layer in layers]
    if architecture.model_type != "smollm3":
        return len(set(kinds))
    interval = config.get("no_rope_layer_interval") or 4
    default = [(index + 1) % interval for index in range(len(kinds))]
    turns = config.get("no_rope_layers") or default
    return len({kind if turn else None for kind, turn in zip(kinds, turns, strict=False)})


def _caps_scores(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether attention caps its scores, which PyTorch's does not do for prompts."""
    if architecture.model_type not in CAPPED_TYPES:
        return False
    return bool(_text_config(config).get("attn_logit_softcapping", True))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("text_config")
    return found if isinstance(found, Mapping) else config


def fixed_tokens(context: int) -> int:
    """The capacity of a fixed cache."""
    return -(-context // CAPACITY_STEP) * CAPACITY_STEP


def grown_tokens(context: int, chunk: int) -> int:
    """The length of buffers that took `context` tokens chunk by chunk, doubling."""
    length = max(chunk, CAPACITY_STEP)
    while length < context:
        length *= 2
    return length


def rotary_type(config: Mapping[str, Any]) -> str:
    """The kind of rotary frequencies, of the first kind of layers that has one of its own."""
    found = _rotary(config)
    return str(found.get("rope_type") or found.get("type") or "default")


def _original_context(config: Mapping[str, Any]) -> int | None:
    found = _rotary(config).get("original_max_position_embeddings")
    found = found or config.get("original_max_position_embeddings")
    found = found or config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _rotary(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for fields in (config, config.get("text_config")):
        for key in ("rope_parameters", "rope_scaling"):
            found = fields.get(key) if isinstance(fields, Mapping) else None
            if isinstance(found, Mapping):
                return found
    return {}


def _without_window(layer: CacheLayer) -> CacheLayer:
    """Every token is kept, and a latent's."""
    return replace(layer, window=None) if isinstance(layer, AttentionCache) else layer
