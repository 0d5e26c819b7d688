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

Attention itself is fused (no matrix of tokens x tokens) except where transformers has no such path.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from qtool.architecture import Architecture
from qtool.planner.kv_cache import CacheLayers, overhang_bytes

# Hidden-sized tensors alive at the MLP's product: the embeddings, the layer's input, the residual
# and the normed input. Some layers hold more, or norm after the MLP instead of before.
USUAL_HIDDEN_COPIES: Final = 4
HIDDEN_COPIES: Final = {"gpt2": 6, "olmo2": 3, "olmo3": 3}
# The same where a norm tells the model type's two kinds of layers apart.
HIDDEN_COPIES_WITH_NORM: Final = {
    "falcon": ("ln_attn.weight", 5),
    "stablelm": ("post_attention_layernorm.weight", 6),
}


class MlpCopies(NamedTuple):
    """MLP-sized tensors alive between its linear layers, and when the largest of them is done."""

    activation: int
    linear: int


GATED_MLP: Final = MlpCopies(3, 2)
FUSED_GATE_MLP: Final = MlpCopies(4, 2)
PLAIN_MLP: Final = MlpCopies(2, 1)
# `gelu_new` is spelled out in Python and keeps two more than a fused activation.
MLP_COPIES: Final = {"gpt2": MlpCopies(4, 1), "phi": MlpCopies(4, 1)}

# Bytes per entry of the attention matrix (heads x tokens x tokens) where it is materialised:
# scores in 16 bit, their float32 copy, the float32 softmax; sums with ALiBi and mask before them.
ATTENTION_MATRIX_BYTES: Final = {"bloom": 14, "gemma2": 10}

# Models whose layers get an explicit mask (tokens x tokens) without a sliding window.
MASKED_MODEL_TYPES: Final = frozenset({"falcon"})

INTEGER_INPUTS_BYTES: Final = 24  # token id, position and mask, int64 each
LOGIT_COPY_BYTES: Final = 4  # the float32 copy that a token is chosen from


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's activations are made of, in elements per token; see the module's text.

    `attention_matrix_bytes` are per pair of tokens: 0 where attention is fused.
    """

    hidden: int
    hidden_copies: int
    mlp: int
    mlp_copies: MlpCopies
    attention: int
    rotary: int
    vocabulary: int
    cache_layers: CacheLayers
    kinds_of_layers: int
    always_masked: bool
    attention_matrix_bytes: int

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """The shape of a decoder with attention layers."""
        model_type = architecture.model_type
        queries = architecture.num_attention_heads * architecture.head_dim
        keys = architecture.num_kv_heads * architecture.head_dim
        kinds_of_layers = {layer.window is None for layer in architecture.cache_layers}  # at most 2
        per_pair = ATTENTION_MATRIX_BYTES.get(model_type, 0)
        return cls(
            hidden=architecture.hidden_size,
            hidden_copies=_hidden_copies(architecture),
            mlp=architecture.intermediate_size,
            mlp_copies=_mlp_copies(architecture),
            attention=3 * architecture.hidden_size + max(4 * queries, queries + 4 * keys),
            rotary=2 * architecture.head_dim * len(kinds_of_layers),  # cosines and sines
            vocabulary=architecture.vocab_size,
            cache_layers=Counter(architecture.cache_layers),
            kinds_of_layers=len(kinds_of_layers),
            always_masked=model_type in MASKED_MODEL_TYPES,
            attention_matrix_bytes=per_pair * architecture.num_attention_heads,
        )

    def mask_bytes(self, context: int, element_bytes: int) -> int:
        """Masks, shared by the sequences of a batch.

        One boolean per pair of tokens for sliding windows in fused attention, one number per pair
        and kind of layer where attention is not fused.
        """
        if self.attention_matrix_bytes:
            return context * context * element_bytes * self.kinds_of_layers
        windows = (layer.window for layer in self.cache_layers if layer.window is not None)
        is_masked = self.always_masked or any(window <= context for window in windows)
        return context * context if is_masked else 0


@dataclass(frozen=True, slots=True)
class DequantBuffer:
    """What a packed linear layer takes: while its weight is made, and while it is multiplied by."""

    dequantizing_bytes: int
    product_bytes: int


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
) -> PrefillPeak:
    """The peak of one forward pass over `batch` prompts of `context` tokens each.

    Args:
        element_bytes: of activations and cache.
        buffer: what the largest packed linear layer takes beside its inputs and output.
        converted_bytes: per element where packed layers compute in another dtype than the
            activations', so that their inputs and outputs exist twice.
    """
    tokens = batch * context
    elements = tokens * element_bytes
    in_layer = elements * layer.rotary + tokens * INTEGER_INPUTS_BYTES
    in_layer += layer.mask_bytes(context, element_bytes)
    in_layer += overhang_bytes(
        layer.cache_layers, context=context, batch=batch, element_bytes=element_bytes
    )
    hidden = in_layer + elements * layer.hidden_copies * layer.hidden
    mlp = elements * layer.mlp
    twice = tokens * converted_bytes * (layer.hidden + layer.mlp)
    matrix = batch * context * context * layer.attention_matrix_bytes
    logits_bytes = batch * layer.vocabulary * (element_bytes + LOGIT_COPY_BYTES)
    moments = (
        PrefillPeak(hidden + layer.mlp_copies.activation * mlp, 0, 0),
        PrefillPeak(hidden + layer.mlp_copies.linear * mlp + twice, buffer.product_bytes, 0),
        PrefillPeak(hidden + mlp + twice, buffer.dequantizing_bytes, 0),
        PrefillPeak(in_layer + elements * layer.attention + matrix, 0, 0),
        PrefillPeak(in_layer + elements * 2 * layer.hidden, 0, logits_bytes),
    )
    return max(moments, key=lambda moment: moment.total_bytes)


def _hidden_copies(architecture: Architecture) -> int:
    copies = HIDDEN_COPIES.get(architecture.model_type, USUAL_HIDDEN_COPIES)
    norm, copies_with_norm = HIDDEN_COPIES_WITH_NORM.get(architecture.model_type, ("", copies))
    has_norm = any(name.endswith(norm) for name in architecture.tensors)
    return copies_with_norm if has_norm else copies


def _mlp_copies(architecture: Architecture) -> MlpCopies:
    if architecture.model_type in MLP_COPIES:
        return MLP_COPIES[architecture.model_type]
    for name in architecture.tensors:
        if name.endswith("gate_up_proj.weight"):
            return FUSED_GATE_MLP
        if name.endswith("gate_proj.weight"):
            return GATED_MLP
    return PLAIN_MLP
