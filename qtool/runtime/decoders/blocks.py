"""The decoder block that Llama and its kin share, found in a transformers model.

    blocks = describe_network(model).blocks

Every part is looked at, nothing is taken for granted: what the fused kernels do not do is said, and
the model runs by another path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from cupy_kernels.linear_few import Format, Gate, LinearKind, LinearWeight, fits
from cupy_kernels.linear_few import Norm as NormKind
from qtool.formats.precisions import NESTED_BLOCKSIZE
from qtool.runtime.adapters import LowRank, OtherAdapter, is_peft_layer, split_adapter
from qtool.runtime.dequantize_host import KERNEL_DTYPES
from qtool.runtime.linear import Linear4bit, LinearInt8

# Types whose blocks are exactly: norm, attention, residual, norm, gated MLP, residual; and where
# what is added goes through a norm of its own (Gemma 2 and 3), these too.
MODEL_TYPES: Final = frozenset(
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
# Whose norms hold the weight less one.
PLUS_ONE_TYPES: Final = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
# Which types look at which cap; the config of others may hold it and nobody asks.
SCORE_SOFTCAP_TYPES: Final = frozenset({"gemma2"})
LOGIT_SOFTCAP_TYPES: Final = frozenset({"gemma2", "gemma3_text"})
# Where the config names the MLP's activation; others may hold that name and nobody asks.
ACTIVATION_NAMES: Final = {"gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}
# Older transformers scale the embeddings of these outside of the embedding.
SCALED_EMBEDDING_TYPES: Final = frozenset({"gemma", "gemma2"})
UNTURNED: Final = "no rotary embedding"  # in the place of a layer's type
GATES: Final[dict[str, Gate]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


class NotFusable(Exception):
    """What the fused kernels do not do, in a few words."""


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """INT8 rows for which the activations of many tokens are rounded too, see `int8_products`."""

    codes: Tensor
    scb: Tensor
    threshold: float


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A linear layer, or a range of rows of one, as a launch takes it.

    Args:
        bias: (rows,) or None.
        plain: the weight itself (rows, columns), where it is not packed.
        adapter: what LoRA adds to these rows.
        rounded: the weight as INT8 products take it, where they are asked for.
    """

    kind: LinearKind
    weight: LinearWeight
    bias: Tensor | None = None
    plain: Tensor | None = None
    adapter: LowRank | None = None
    rounded: Int8Rows | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm: weight (size,), and whether one is added to it."""

    weight: Tensor
    epsilon: float
    plus_one: bool

    @property
    def kind(self) -> NormKind:
        """What the kernels call it."""
        return "rms_plus_one" if self.plus_one else "rms"


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention does beside its products; window 0 sees everything, softcap 0 caps nothing.

    Args:
        layer_type: whose rotary angles it takes; UNTURNED where it takes none.
    """

    layer_type: str
    scale: float
    softcap: float
    window: int
    query_norm: Norm | None
    key_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block.

    Args:
        query_key_value: one or three layers.
        output_norm: of what `output` makes, before it is added to the hidden state; or None.
        down_norm: the same of `down`.
    """

    attention_norm: Norm
    query_key_value: tuple[PackedRows, ...]
    attention: Attention
    output: PackedRows
    output_norm: Norm | None
    mlp_norm: Norm
    gate_up: tuple[PackedRows, PackedRows]
    down: PackedRows
    down_norm: Norm | None

    @property
    def has_added_norms(self) -> bool:
        """Whether anything is normed before it is added to the hidden state."""
        return self.output_norm is not None or self.down_norm is not None


@dataclass(frozen=True, slots=True)
class FusableNetwork:
    """A model of such blocks.

    Args:
        embedding: (vocabulary, hidden).
        embedding_scale: what embeddings are multiplied by; None for nothing.
        logit_softcap: 0 for none.
    """

    dtype: torch.dtype
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gate: Gate
    embedding: Tensor
    embedding_scale: float | None
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: PackedRows
    logit_softcap: float


def describe_network(model: Any) -> FusableNetwork:
    """What the fused kernels need to know of `model`.

    Raises:
        NotFusable: what they do not do.
    """
    refuse_type(model, "fused kernels")
    weight = model.get_input_embeddings().weight
    if weight.dtype not in KERNEL_DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        raise NotFusable(f"fused kernels compute in bfloat16 or float16, not {name}")
    return BlockReader.of(model, weight.device).network(model)


def text_decoder(model: Any) -> Any:
    """What runs the blocks: beside a vision tower it lies one level deeper."""
    return getattr(model.model, "language_model", model.model)


@dataclass(frozen=True, slots=True)
class BlockReader:
    """Reads the parts of one model; NotFusable for what kernels do not do.

    Args:
        config: of its text.
        dtype: of activations, and of what is not packed.
        device: where all layers have to lie.
        plus_one: whether norms hold the weight less one.
    """

    config: Any
    dtype: torch.dtype
    device: torch.device
    plus_one: bool

    @classmethod
    def of(cls, model: Any, device: torch.device) -> Self:
        """The reader of `model`, whose layers have to lie on `device`."""
        return cls(
            model.config.get_text_config(),
            model.get_input_embeddings().weight.dtype,
            device,
            plus_one=model.config.model_type in PLUS_ONE_TYPES,
        )

    def network(self, model: Any) -> FusableNetwork:
        """All of it."""
        config = self.config
        gate = GATES.get(getattr(config, ACTIVATION_NAMES.get(config.model_type, "hidden_act")))
        if gate is None:
            raise NotFusable("its MLP has another activation")
        decoder = text_decoder(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        _refuse_adapters("the embedding", embedding)
        _refuse_adapters("the output head", head)
        is_capped = model.config.model_type in LOGIT_SOFTCAP_TYPES
        return FusableNetwork(
            dtype=self.dtype,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=decoder.layers[0].self_attn.head_dim,
            gate=gate,
            embedding=embedding.weight,
            embedding_scale=_embedding_scale(config, embedding, self.dtype),
            blocks=tuple(self.block(layer, index) for index, layer in enumerate(decoder.layers)),
            final_norm=self.norm(decoder.norm),
            head=self.rows(head),
            logit_softcap=_softcap(config, "final_logit_softcapping", is_capped),
        )

    def block(self, layer: Any, index: int) -> Block:
        """Block number `index`."""
        attention, mlp = layer.self_attn, layer.mlp
        mlp_norm, output_norm, down_norm = self._norms_around_mlp(layer)
        return Block(
            attention_norm=self.norm(layer.input_layernorm),
            query_key_value=self._query_key_value(attention),
            attention=self._attention(attention, index),
            output=self.rows(attention.o_proj),
            output_norm=output_norm,
            mlp_norm=mlp_norm,
            gate_up=self._gate_up(mlp),
            down=self.rows(mlp.down_proj),
            down_norm=down_norm,
        )

    def _norms_around_mlp(self, layer: Any) -> tuple[Norm, Norm | None, Norm | None]:
        """Before the MLP; of what attention adds; of what the MLP adds."""
        behind_attention = self.norm(layer.post_attention_layernorm)
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
        if before_mlp is None:  # then the name says only where it stands
            return behind_attention, None, None
        behind_mlp = self.norm(layer.post_feedforward_layernorm)
        return self.norm(before_mlp), behind_attention, behind_mlp

    def norm(self, module: Any) -> Norm:
        """An RMS norm."""
        _refuse_adapters("a norm", module)
        epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if not isinstance(epsilon, float) or module.weight.dtype != self.dtype:
            raise NotFusable(f"{type(module).__name__} is another kind of norm")
        return Norm(module.weight, epsilon, self.plus_one)

    def rows(self, module: Any, start: int = 0, stop: int | None = None) -> PackedRows:
        """Rows [start, stop) of a linear layer, and of its adapter."""
        try:
            module, adapter = split_adapter(module)
        except OtherAdapter as reason:
            raise NotFusable(str(reason)) from reason
        if not isinstance(module, nn.Linear):
            kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
            raise NotFusable(f"a layer is {kind}")
        stop = module.out_features if stop is None else stop
        found = self.own_rows(module, start, stop)
        if adapter is None:
            return found
        return replace(found, adapter=replace(adapter, b=adapter.b[start:stop]))

    def own_rows(self, module: nn.Linear, start: int, stop: int) -> PackedRows:
        """The same without an adapter."""
        if module.weight.device != self.device:
            raise NotFusable("a layer lies on another device")
        found = _packed_rows(module, self.dtype, start, stop)
        addresses = (found.weight.weight, found.weight.bias)
        if not fits(found.kind) or any(address % 16 for address in addresses):
            raise NotFusable(f"a layer of {module.in_features} columns does not fit the kernels")
        return found

    def _query_key_value(self, attention: Any) -> tuple[PackedRows, ...]:
        joined = getattr(attention, "qkv_proj", None)
        if joined is not None:
            return (self.rows(joined),)
        found = tuple(
            self.rows(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return _of_one_kind(found, "query, key and value")

    def _gate_up(self, mlp: Any) -> tuple[PackedRows, PackedRows]:
        joined = getattr(mlp, "gate_up_proj", None)
        if joined is None:
            gate, up = self.rows(mlp.gate_proj), self.rows(mlp.up_proj)
        else:
            half = joined.out_features // 2
            gate, up = self.rows(joined, 0, half), self.rows(joined, half)
        gate, up = _of_one_kind((gate, up), "gate and up")
        return gate, up

    def _attention(self, module: Any, index: int) -> Attention:
        if not getattr(module, "is_causal", True):
            raise NotFusable("its attention sees later tokens")
        layer_types = getattr(self.config, "layer_types", None)
        layer_type = layer_types[index] if layer_types else "full_attention"
        window = getattr(self.config, "sliding_window", None) or 0
        if layer_type == "full_attention":
            # Without a list of types the window, where there is one, holds for all layers.
            window = 0 if layer_types else window
        elif layer_type != "sliding_attention":
            raise NotFusable(f"{layer_type} has no fused kernel")
        query_norm, key_norm = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        has_softcap = self.config.model_type in SCORE_SOFTCAP_TYPES
        softcap = _softcap(self.config, "attn_logit_softcapping", has_softcap)
        # Before 5.23 transformers gave Gemma 2 to PyTorch's attention, which knows no cap.
        if softcap and getattr(self.config, "_attn_implementation", None) == "sdpa":
            raise NotFusable("this version of transformers leaves out the cap of its scores")
        return Attention(
            layer_type=layer_type if getattr(module, "use_rope", True) else UNTURNED,
            scale=float(module.scaling),
            softcap=softcap,
            window=window,
            query_norm=None if query_norm is None else self.norm(query_norm),
            key_norm=None if key_norm is None else self.norm(key_norm),
        )


def refuse_type(model: Any, what: str) -> None:
    """NotFusable for types of which there are no `what`."""
    if model.config.model_type not in MODEL_TYPES:
        raise NotFusable(f"{model.config.model_type} blocks have no {what}")


def _refuse_adapters(what: str, module: Any) -> None:
    if is_peft_layer(module):
        raise NotFusable(f"an adapter changes {what}")


def _of_one_kind(found: tuple[PackedRows, ...], what: str) -> tuple[PackedRows, ...]:
    if len({rows.kind for rows in found}) > 1:
        raise NotFusable(f"{what} are packed in different ways")
    return found


def check_compute_dtype(layer: Linear4bit | LinearInt8, dtype: torch.dtype) -> None:
    """NotFusable where a layer would convert activations, which are of `dtype`."""
    if layer.compute_dtype not in (None, dtype):
        wanted, found = (str(it).removeprefix("torch.") for it in (layer.compute_dtype, dtype))
        raise NotFusable(
            f"layers compute in {wanted}, activations are {found}: choose {wanted} as the "
            "compute dtype of both"
        )


def _packed_rows(module: nn.Linear, dtype: torch.dtype, start: int, stop: int) -> PackedRows:
    bias = module.bias
    if bias is not None and bias.dtype != dtype:
        raise NotFusable("a bias of another dtype")
    bias_at = 0 if bias is None else bias.data_ptr() + start * bias.element_size()
    own_bias = None if bias is None else bias[start:stop]
    if isinstance(module, Linear4bit | LinearInt8):
        check_compute_dtype(module, dtype)
        name = KERNEL_DTYPES[dtype]
        if isinstance(module, Linear4bit):
            kind, weight = four_bit_rows(module, name, start, stop, bias_at)
        else:
            kind, weight = int8_rows(module, name, start, stop, bias_at)
        return PackedRows(kind, weight, own_bias, rounded=_rounded_rows(module, start, stop))
    if type(module) is not nn.Linear or module.weight.dtype != dtype:
        raise NotFusable(f"{type(module).__name__} layers have no fused kernel")
    kind = LinearKind("plain", module.in_features, KERNEL_DTYPES[dtype])
    plain = module.weight[start:stop]
    weight = LinearWeight(stop - start, plain.data_ptr(), bias=bias_at)
    return PackedRows(kind, weight, own_bias, plain)


def four_bit_rows(
    module: Linear4bit, dtype: str, start: int, stop: int, bias_at: int
) -> tuple[LinearKind, LinearWeight]:
    """Rows [start, stop) of a 4-bit layer, see `PackedRows`; `bias_at` is the address of theirs.

    Args:
        dtype: that of the kind.

    Raises:
        NotFusable: the rows begin within a block of absmax, or a group of it.
    """
    layer = module.layer
    fmt: Format = layer.quant_type
    kind = LinearKind(fmt, layer.in_features, dtype, layer.blocksize, nested=layer.double_quant)
    first, rest = divmod(start * layer.in_features, layer.blocksize)
    packed = module.weight.data_ptr() + start * layer.in_features // 2
    if not layer.double_quant:
        if rest:
            raise NotFusable("gate and up share a block of absmax")
        absmax = module.absmax.data_ptr() + first * 4
        return kind, LinearWeight(stop - start, packed, absmax, bias=bias_at)
    group, rest = divmod(start * layer.in_features, layer.blocksize * NESTED_BLOCKSIZE)
    if rest:
        raise NotFusable("gate and up share a group of absmax")
    weight = LinearWeight(
        stop - start,
        packed,
        absmax_codes=module.absmax.data_ptr() + first,
        nested_absmax=module.nested_absmax.data_ptr() + group * 4,
        nested_quant_map=module.nested_quant_map.data_ptr(),
        nested_offset=module.nested_offset.data_ptr(),
        bias=bias_at,
    )
    return kind, weight


def int8_rows(
    module: LinearInt8, dtype: str, start: int, stop: int, bias_at: int
) -> tuple[LinearKind, LinearWeight]:
    """The same of an INT8 layer."""
    kind = LinearKind("int8", module.in_features, dtype)
    codes = module.weight.data_ptr() + start * module.in_features
    scb = module.SCB.data_ptr() + start * 4
    return kind, LinearWeight(stop - start, codes, scb, bias=bias_at)


def _rounded_rows(module: Linear4bit | LinearInt8, start: int, stop: int) -> Int8Rows | None:
    if isinstance(module, Linear4bit) or module.threshold is None or (stop - start) % 8:
        return None
    return Int8Rows(module.weight.data[start:stop], module.SCB[start:stop], module.threshold)


def _embedding_scale(config: Any, module: Any, dtype: torch.dtype) -> float | None:
    """What embeddings are multiplied by, rounded as the model rounds it."""
    scale = getattr(module, "embed_scale", None)
    if scale is None and config.model_type in SCALED_EMBEDDING_TYPES:
        scale = config.hidden_size**0.5
    return None if scale is None else float(torch.as_tensor(scale).to(dtype))


def _softcap(config: Any, name: str, applies: bool) -> float:
    """What `config` caps under this name, 0 for nothing."""
    return float((applies and getattr(config, name, None)) or 0.0)
