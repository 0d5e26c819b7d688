"""What the forward pass over a whole prompt allocates beside weights and cache.

The peak is the largest of a few moments in the life of a layer; every element count below was
checked against the storages that transformers' own modules allocate (tests/planner). Elements are
of the activation dtype, counted per token of the prompt, and h, i, q, kv are the widths of hidden
state, MLP, queries and keys:

    activation       c*h + m*i              between the MLP's linear layers
    largest linear   c*h + l*i + its weight in floating point
    dequantizing     c*h + i + what makes that weight from codes, before the output exists
    attention        3*h + max(4*q, q + 4*kv)    rotating queries, then keys
    logits           2*h + one row of the vocabulary per sequence

Attention itself is fused (no matrix of tokens x tokens) except where transformers has no such path,
and where PyTorch has no kernel: float32 heads that share keys, see `spelled_out_peak`.
A mixture of experts copies every token once per expert that it goes to, k of them of width e:

    experts          c*h + k*h + 4*k*e      gate and up, the activation, their product
    reordering       c*h + 2*k*h            and twice k*h weighted rows, in the weights' dtype

Multi-head latent attention makes keys and values of all n heads from the latent l, with keys of d,
r of them rotated, and values of d - r:

    latent           4*h + n*(6*d - 2*r) + 2*(l + r)    queries twice, keys, both in one, the output

Recurrent layers (state space, linear attention) are a multiple of their convolution's channels,
read off runs on the meta device: a heuristic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, Self

from qtool.architecture import (
    Architecture,
    AttentionCache,
    CacheLayer,
    LatentCache,
    RecurrentState,
)
from qtool.planner.kv_cache import CacheLayers, overhang_bytes
from qtool.planner.llm_int8 import int8_moments
from qtool.planner.mlp_activations import mlp_activation
from qtool.planner.units import FLOAT32_BYTES

# Hidden-sized tensors alive at the MLP's product: the embeddings, the layer's input, the residual
# and the normed input. Some layers hold more, or norm after the MLP instead of before.
USUAL_HIDDEN_COPIES: Final = 4
HIDDEN_COPIES: Final = {"gpt2": 6, "olmo2": 3, "olmo3": 3}
# The same where a mixture keeps what its shared expert or dense MLP made.
HIDDEN_COPIES_WITH_EXPERTS: Final = {
    "gemma4": 7,
    "gemma4_text": 7,
    "llama4": 5,
    "llama4_text": 5,
    "ernie4_5_moe": 5,
    "qwen2_moe": 5,
}
# The same where a norm tells the model type's two kinds of layers apart.
HIDDEN_COPIES_WITH_NORM: Final = {
    "falcon": ("ln_attn.weight", 5),
    "stablelm": ("post_attention_layernorm.weight", 6),
}


class MlpCopies(NamedTuple):
    """MLP-sized tensors alive between its linear layers, and when the largest of them is done.

    `beside` are those alive beside its activation: gate and up projection may be one tensor.
    """

    activation: int
    linear: int
    beside: int = 0


GATED_MLP: Final = MlpCopies(3, 2)
FUSED_GATE_MLP: Final = MlpCopies(4, 2, beside=1)
PLAIN_MLP: Final = MlpCopies(2, 1)

# Bytes per entry of the attention matrix (heads x tokens x tokens) where it is materialised:
# scores in 16 bit, their float32 copy, the float32 softmax; sums with ALiBi and mask before them.
# With sinks: scores with the sinks appended, less their maximum, and the softmax, in 16 bit.
ATTENTION_MATRIX_BYTES: Final = {
    "bloom": 14,
    "gemma2": 10,
    "gpt_oss": 6,
    "mimo_v2_flash": 4,
    "deepseek_v4": 6,
}
# What of it the layer holds until its end, because attention returns it.
KEPT_MATRIX_BYTES: Final = {"gemma2": 2, "gpt_oss": 2, "mimo_v2_flash": 2}

# Bytes per score where PyTorch spells attention out in float32: scores, their softmax, and of each
# whether it is masked, which finds rows with nothing to see.
SPELLED_OUT_BYTES: Final = 9
# Wider heads, and values of another width, transformers repeats: then a fused kernel takes them.
LARGEST_GROUPED_HEAD: Final = 256

# Models whose layers get an explicit mask (tokens x tokens) without a sliding window.
MASKED_MODEL_TYPES: Final = frozenset({"falcon", "qwen2_moe"})

# Routers whose weights have the dtype of the activations; the others' are float32, and so are the
# rows that they weigh.
HALF_ROUTERS: Final = frozenset(
    {"qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}
    | {"olmoe", "granitemoe", "ernie4_5_moe", "gpt_oss"}
)
# Expert-sized tensors at the activation. With biases of every row, and the activation spelled out:
USUAL_EXPERT_COPIES: Final = 4
EXPERT_COPIES: Final = {"gpt_oss": 9}
# Every token goes through every expert, and what comes out is weighed by zero.
DENSE_MIXTURES: Final = frozenset({"llama4", "llama4_text"})

# Channel-sized tensors of 16 bit alive at the peak of a recurrent layer.
RECURRENT_COPIES: Final = {"nemotron_h": 30, "jamba": 107, "mamba2": 45}
USUAL_RECURRENT_COPIES: Final = 16
CONVOLUTION_WIDTH: Final = 4

INTEGER_INPUTS_BYTES: Final = 24  # token id, position and mask, int64 each
LOGIT_COPY_BYTES: Final = 4  # the float32 copy that a token is chosen from


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """The rows that a mixture makes of a token, one per expert: of `hidden` and expert `width`.

    `copies` of the width are alive at the activation. `weighted_bytes` is per element of a row
    times its weight, None for the dtype of activations. `routing_bytes`: indices, weights and the
    router's scores of a token.
    """

    rows: int
    hidden: int
    width: int
    copies: int
    weighted_bytes: int | None
    routing_bytes: int

    @classmethod
    def of(cls, architecture: Architecture) -> Self | None:
        """None without experts."""
        experts = architecture.experts
        if experts is None:
            return None
        is_dense = architecture.model_type in DENSE_MIXTURES
        rows = experts.num_experts if is_dense else experts.experts_per_token
        return cls(
            rows=rows,
            hidden=architecture.hidden_size,
            width=experts.intermediate_size,
            copies=EXPERT_COPIES.get(architecture.model_type, USUAL_EXPERT_COPIES),
            weighted_bytes=None if is_dense or architecture.model_type in HALF_ROUTERS else 4,
            routing_bytes=40 * experts.experts_per_token + 4 * experts.num_experts,
        )

    def peak_bytes(self, element_bytes: int) -> int:
        """Per token, the larger of both moments."""
        activation = self.hidden + self.copies * self.width
        reordering = 2 * self.hidden
        weighted_bytes = 2 * self.hidden * (self.weighted_bytes or element_bytes)
        row_bytes = max(activation * element_bytes, reordering * element_bytes + weighted_bytes)
        return self.rows * row_bytes + self.routing_bytes


class GroupedHeads(NamedTuple):
    """Query heads, of `width` elements per token in all, of which several share keys and values.

    With a `window` they see no more tokens without a mask, whose heads are repeated and fused.
    """

    heads: int
    width: int
    window: int | None

    def cut(self, num_gpus: int) -> Self:
        """One GPU's part under tensor parallelism."""
        heads, width = (-(-number // num_gpus) for number in (self.heads, self.width))
        return self._replace(heads=heads, width=width)

    def spelled_out_bytes(self, *, tokens: int, keys: int, batch: int) -> int:
        """Attention of `tokens` over `keys` positions in float32, operation by operation.

        After PyTorch 2.13's `_scaled_dot_product_attention_math` and `_safe_softmax`
        (aten/src/ATen/native/transformers/attention.cpp): queries and a scaled copy, keys and
        values once per head, a mask of numbers that sequences share, and either

            scores     one of each, beside scaled keys and, of several sequences, queries in order
            softmax    SPELLED_OUT_BYTES of each
        """
        if self.window is not None:
            tokens, keys = (min(number, self.window - 1) for number in (tokens, keys))
        queries, repeated = batch * tokens * self.width, batch * keys * self.width
        scores = batch * self.heads * tokens * keys
        held = 2 * queries + 2 * repeated + tokens * keys
        multiplying = repeated + (queries if batch > 1 else 0) + scores
        return FLOAT32_BYTES * held + max(FLOAT32_BYTES * multiplying, SPELLED_OUT_BYTES * scores)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's activations are made of, in elements per token; see the module's text.

    `attention` is the largest of the kinds of attention and recurrent layers, `basis` says whether
    it is counted or read off. `attending` is what is alive of a chunk that looks at a longer cache,
    `repeated` per cached position: keys and values once per head of a group, or from latents.
    `attention_matrix_bytes` are per pair of tokens, 0 where attention is fused; `kept_matrix_bytes`
    of them stay until the layer's end. `grouped` are the kinds of heads that PyTorch spells out in
    float32.
    """

    hidden: int
    hidden_copies: int
    mlp: int
    mlp_copies: MlpCopies
    attention: int
    attending: int
    repeated: int
    rotary: int
    vocabulary: int
    cache_layers: CacheLayers
    kinds_of_layers: int
    always_masked: bool
    attention_matrix_bytes: int
    kept_matrix_bytes: int
    routed: RoutedRows | None
    grouped: tuple[GroupedHeads, ...]
    basis: Literal["formula", "heuristic"]

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """The shape of a decoder."""
        model_type = architecture.model_type
        attention_layers = [
            layer for layer in architecture.cache_layers if isinstance(layer, AttentionCache)
        ]
        kinds_of_layers = {layer.window is None for layer in attention_layers}  # at most 2
        per_pair = ATTENTION_MATRIX_BYTES.get(model_type, 0)
        return cls(
            hidden=architecture.hidden_size,
            hidden_copies=_hidden_copies(architecture),
            mlp=architecture.intermediate_size,
            mlp_copies=_mlp_copies(architecture),
            attention=max(_attention_elements(architecture), default=0),
            attending=3 * architecture.hidden_size + 2 * _query_elements(architecture),
            repeated=max(_repeated_elements(architecture), default=0),
            rotary=2 * architecture.head_dim * len(kinds_of_layers),  # cosines and sines
            vocabulary=architecture.vocab_size,
            cache_layers=Counter(architecture.cache_layers),
            kinds_of_layers=len(kinds_of_layers),
            always_masked=model_type in MASKED_MODEL_TYPES,
            attention_matrix_bytes=per_pair * architecture.num_attention_heads,
            kept_matrix_bytes=KEPT_MATRIX_BYTES.get(model_type, 0)
            * architecture.num_attention_heads,
            routed=RoutedRows.of(architecture),
            grouped=tuple(_grouped_heads(architecture)),
            basis="formula" if all(map(_is_counted, architecture.cache_layers)) else "heuristic",
        )

    def cut(self, num_gpus: int) -> Self:
        """One GPU's part under tensor parallelism: hidden states whole, what heads and MLPs make
        of them in parts."""
        whole = min(3 * self.hidden, self.attention)
        return replace(
            self,
            mlp=-(-self.mlp // num_gpus),
            attention=whole - (whole - self.attention) // num_gpus,
            attending=self.attending - (self.attending - whole) // num_gpus * (num_gpus - 1),
            repeated=-(-self.repeated // num_gpus),
            attention_matrix_bytes=-(-self.attention_matrix_bytes // num_gpus),
            kept_matrix_bytes=-(-self.kept_matrix_bytes // num_gpus),
            routed=self.routed and replace(self.routed, width=-(-self.routed.width // num_gpus)),
            grouped=tuple(heads.cut(num_gpus) for heads in self.grouped),
        )

    def always_fused(self) -> Self:
        """The same where attention never makes a matrix, a mask or keys beyond its window: vLLM."""
        return replace(
            self,
            cache_layers=Counter(),
            always_masked=False,
            attention_matrix_bytes=0,
            kept_matrix_bytes=0,
            grouped=(),
        )

    def mask_bytes(self, context: int, element_bytes: int, keys: int | None = None) -> int:
        """Masks, shared by the sequences of a batch.

        One boolean per pair of tokens for sliding windows in fused attention, one number per pair
        and kind of layer where attention is not fused. Tokens that look at `keys` cached positions
        have a boolean per pair and kind of layer.
        """
        if self.attention_matrix_bytes:
            return context * (keys or context) * element_bytes * self.kinds_of_layers
        if keys is not None:
            return context * keys * self._kinds_of_masks
        return context * context if self._is_masked(context) else 0

    def additive_mask_bytes(
        self, context: int, batch: int, element_bytes: int, keys: int | None = None
    ) -> int:
        """The mask as numbers, which a fused kernel wants of every sequence.

        A context that is no multiple of 8 takes it twice, which is left out: then more tokens
        would need less.
        """
        if self.attention_matrix_bytes:
            return 0
        if keys is not None:
            return batch * context * keys * element_bytes if self._kinds_of_masks else 0
        return batch * context * context * element_bytes if self._is_masked(context) else 0

    @property
    def _kinds_of_masks(self) -> int:
        """Layers with a latent share one."""
        has_latents = any(isinstance(layer, LatentCache) for layer in self.cache_layers)
        return self.kinds_of_layers or int(has_latents)

    def _is_masked(self, context: int) -> bool:
        windows = (layer.window for layer in self.cache_layers if isinstance(layer, AttentionCache))
        return self.always_masked or any(
            window is not None and window <= context for window in windows
        )


@dataclass(frozen=True, slots=True)
class DequantBuffer:
    """What a packed linear layer takes: while its weight is made, and while it is multiplied by."""

    dequantizing_bytes: int
    product_bytes: int

    def cut(self, num_gpus: int) -> DequantBuffer:
        """That of one GPU under tensor parallelism."""
        return DequantBuffer(
            -(-self.dequantizing_bytes // num_gpus), -(-self.product_bytes // num_gpus)
        )


NO_BUFFER: Final = DequantBuffer(0, 0)


@dataclass(frozen=True, slots=True)
class PrefillPeak:
    """What is alive, in bytes, at the moment that needs most beside weights and cache."""

    activations_bytes: int
    dequant_buffer_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.activations_bytes + self.dequant_buffer_bytes + self.logits_bytes


def prefill_peak(
    layer: LayerShape,
    *,
    context: int,
    batch: int,
    element_bytes: int,
    buffer: DequantBuffer = NO_BUFFER,
    converted_bytes: int = 0,
    int8_outliers: float | None = None,
    keys: int | None = None,
) -> PrefillPeak:
    """The peak of one forward pass over `batch` prompts of `context` tokens each.

    Args:
        element_bytes: of activations and cache.
        keys: where the tokens are the last chunk of a longer prompt, the cached positions that
            attention looks at. Then it has a mask, and keys and values of grouped heads repeated.
        buffer: what the largest packed linear layer takes beside its inputs and output.
        converted_bytes: per element where packed layers compute in another dtype than the
            activations', so that their inputs and outputs exist twice.
        int8_outliers: where products are LLM.int8's, the share of the MLP's columns with outliers.
    """
    tokens = batch * context
    elements = tokens * element_bytes
    in_layer = _in_layer_bytes(layer, context, batch, element_bytes, keys)
    hidden = in_layer + elements * layer.hidden_copies * layer.hidden
    hidden += batch * context * (keys or context) * layer.kept_matrix_bytes
    mlp = elements * layer.mlp
    twice = tokens * converted_bytes * (layer.hidden + layer.mlp)
    matrix = batch * context * (keys or context) * layer.attention_matrix_bytes
    float_mask = layer.additive_mask_bytes(context, batch, element_bytes, keys)
    scores = elements * layer.attention + matrix + float_mask
    if keys is not None:
        repeated = batch * keys * layer.repeated * element_bytes
        attending = elements * layer.attending + repeated + matrix + float_mask
        scores = max(elements * layer.attention, attending)
    routed = tokens * layer.routed.peak_bytes(element_bytes) if layer.routed else 0
    logits_bytes = batch * layer.vocabulary * (element_bytes + LOGIT_COPY_BYTES)
    moments = (
        PrefillPeak(hidden + layer.mlp_copies.activation * mlp, 0, 0),
        PrefillPeak(hidden + routed, 0, 0),
        PrefillPeak(hidden + layer.mlp_copies.linear * mlp + twice, buffer.product_bytes, 0),
        PrefillPeak(hidden + mlp + twice, buffer.dequantizing_bytes, 0),
        PrefillPeak(in_layer + scores, 0, 0),
        PrefillPeak(in_layer + elements * 2 * layer.hidden, 0, logits_bytes),
        *_int8_moments(layer, tokens, hidden, int8_outliers, element_bytes),
    )
    return max(moments, key=lambda moment: moment.total_bytes)


def spelled_out_peak(
    layer: LayerShape, *, tokens: int, batch: int, keys: int | None = None
) -> PrefillPeak:
    """The peak of attention in float32 where heads share keys, which no fused kernel takes.

    That is the case without a mask: of a whole prompt or its first chunk, since later ones have
    masks, for which transformers repeats keys and values. Layers with a window have masks once the
    text is longer; they are counted as before then, or more tokens would need less. Nothing where
    there are no such heads.

    Args:
        tokens: of each of `batch` sequences.
        keys: cached positions that one token looks at; None for a prompt's own.
    """
    if not layer.grouped:
        return PrefillPeak(0, 0, 0)
    sizes = {"tokens": tokens, "keys": keys or tokens, "batch": batch}
    attention = max(heads.spelled_out_bytes(**sizes) for heads in layer.grouped)
    hidden = batch * tokens * 3 * layer.hidden * FLOAT32_BYTES
    in_layer = _in_layer_bytes(layer, tokens, batch, FLOAT32_BYTES, None)
    return PrefillPeak(in_layer + hidden + attention, 0, 0)


def _in_layer_bytes(
    layer: LayerShape, context: int, batch: int, element_bytes: int, keys: int | None
) -> int:
    """What lies beside the states of a layer from its first moment to its last."""
    tokens = batch * context
    num_bytes = tokens * (element_bytes * layer.rotary + INTEGER_INPUTS_BYTES)
    num_bytes += layer.mask_bytes(context, element_bytes, keys)
    if keys is None:
        num_bytes += overhang_bytes(
            layer.cache_layers, context=context, batch=batch, element_bytes=element_bytes
        )
    return num_bytes


def _int8_moments(
    layer: LayerShape,
    tokens: int,
    hidden_bytes: int,
    outliers: float | None,
    element_bytes: int,
) -> Iterator[PrefillPeak]:
    if outliers is None:
        return
    is_fused = layer.mlp_copies.beside == FUSED_GATE_MLP.beside
    moments = int8_moments(
        tokens=tokens,
        hidden=layer.hidden,
        mlp=layer.mlp,
        first_width=layer.mlp * (2 if is_fused else 1),
        beside_first=0 if is_fused else layer.mlp_copies.linear - 1,
        outliers=outliers,
        element_bytes=element_bytes,
    )
    for moment in moments:
        yield PrefillPeak(hidden_bytes + moment.activations_bytes, moment.weight_bytes, 0)


def _attention_elements(architecture: Architecture) -> Iterator[int]:
    """Per token, for each kind of layer."""
    for layer in set(architecture.cache_layers):
        heads, hidden = architecture.num_attention_heads, 3 * architecture.hidden_size
        if isinstance(layer, RecurrentState):
            copies = RECURRENT_COPIES.get(architecture.model_type, USUAL_RECURRENT_COPIES)
            yield hidden + copies * layer.conv_elements // CONVOLUTION_WIDTH
        elif isinstance(layer, LatentCache):
            per_head = 6 * architecture.head_dim - 2 * layer.rope_dim
            latents = 2 * (layer.latent_dim + layer.rope_dim)
            yield hidden + architecture.hidden_size + heads * per_head + latents
        else:
            kv_heads = layer.num_kv_heads if isinstance(layer, AttentionCache) else 1
            queries, keys = heads * layer.head_dim, kv_heads * layer.head_dim
            yield hidden + max(4 * queries, queries + 4 * keys)


def _query_elements(architecture: Architecture) -> int:
    """Per token, of the widest kind of layer."""
    widths = (it.head_dim for it in architecture.cache_layers if isinstance(it, AttentionCache))
    return architecture.num_attention_heads * max(widths, default=architecture.head_dim)


def _repeated_elements(architecture: Architecture) -> Iterator[int]:
    """Per cached position, for each kind of layer."""
    heads = architecture.num_attention_heads
    for layer in set(architecture.cache_layers):
        if isinstance(layer, AttentionCache) and layer.num_kv_heads < heads:
            yield heads * (layer.head_dim + layer.value_head_dim)
        elif isinstance(layer, LatentCache):  # keys and values made anew, and keys joined
            yield heads * (3 * architecture.head_dim - 2 * layer.rope_dim)


def _grouped_heads(architecture: Architecture) -> Iterator[GroupedHeads]:
    """Of each kind of layer whose attention is PyTorch's, without a mask of the model's own."""
    model_type, heads = architecture.model_type, architecture.num_attention_heads
    if model_type in ATTENTION_MATRIX_BYTES or model_type in MASKED_MODEL_TYPES:
        return
    for layer in set(architecture.cache_layers):
        if (
            isinstance(layer, AttentionCache)
            and layer.num_kv_heads < heads
            and layer.head_dim == layer.value_head_dim <= LARGEST_GROUPED_HEAD
        ):
            yield GroupedHeads(heads, heads * layer.head_dim, layer.window)


def _is_counted(layer: CacheLayer) -> bool:
    if isinstance(layer, LatentCache):
        return layer.index_head_dim == 0
    return isinstance(layer, AttentionCache)


def _hidden_copies(architecture: Architecture) -> int:
    if architecture.experts is not None:
        return HIDDEN_COPIES_WITH_EXPERTS.get(architecture.model_type, USUAL_HIDDEN_COPIES)
    copies = HIDDEN_COPIES.get(architecture.model_type, USUAL_HIDDEN_COPIES)
    norm, copies_with_norm = HIDDEN_COPIES_WITH_NORM.get(architecture.model_type, ("", copies))
    has_norm = any(name.endswith(norm) for name in architecture.tensors)
    return copies_with_norm if has_norm else copies


def _mlp_copies(architecture: Architecture) -> MlpCopies:
    copies = _mlp_kind(architecture)
    spelled_out = mlp_activation(architecture).alive + copies.beside
    return copies._replace(activation=max(copies.activation, spelled_out))


def _mlp_kind(architecture: Architecture) -> MlpCopies:
    """With an activation that is one kernel."""
    for name in architecture.tensors:
        if name.endswith("gate_up_proj.weight"):
            return FUSED_GATE_MLP
        if name.endswith("gate_proj.weight"):
            return GATED_MLP
    return PLAIN_MLP
