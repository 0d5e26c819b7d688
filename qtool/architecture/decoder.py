"""The common decoder: embedding, a stack of attention + MLP layers, a final norm.

Families describe one layer with the words of `parts` and those below; `decoder` stacks it. Sizes
are elements, contexts are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool.architecture.cache import AttentionCache, CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.parts import Tensors, embedding, experts, linear, norm, parameter
from qtool.architecture.records import Experts, ModelTensor
from qtool.architecture.stored_names import StoredNames

USUAL_ACTIVATION = "silu"

# The two norms of most layers: before attention, before the MLP.
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")

# What a layer of the given name consists of.
Layer = Callable[[str], Tensors]

# Buffers that old checkpoints carry and the model computes itself.
ROTARY_BUFFER = (r"rotary_emb\.inv_freq$", "rotary frequencies, which the model computes itself")
PLAIN_NAMES = StoredNames("model", ignored=(ROTARY_BUFFER,))

# transformers still reads these older words (configuration_utils.py, _LEGACY_LAYER_TYPE_REMAP).
_OLD_LAYER_TYPES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A text decoder's sizes, and the activation of its MLPs by transformers' name.

    `max_context` is None where positions are not limited.
    """

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_context: int | None
    activation: str = USUAL_ACTIVATION

    @property
    def query_width(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A model up to its last hidden state; the class decides which head follows.

    `embedding` is the module an output head may be tied to, `head` the name of that head,
    `head_inputs` the width it reads.
    """

    sizes: Sizes
    tensors: Tensors
    embedding: str
    head_inputs: int
    head: str = "lm_head"
    head_bias: bool = False
    tied: bool
    cache_layers: tuple[CacheLayer, ...]
    stored_names: StoredNames
    experts: Experts | None = None
    unmodelled: tuple[str, ...] = ()


def read_sizes(
    config: Config,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    vocab: int,
    context: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: str = USUAL_ACTIVATION,
    activation_key: str = "hidden_act",
) -> Sizes:
    """The sizes under their usual keys; the arguments are the model type's defaults.

    No `kv_heads` means one per query head, no `head_dim` hidden / heads.
    """
    hidden = config.count("hidden_size", hidden)
    heads = config.count("num_attention_heads", heads)
    return Sizes(
        num_layers=config.num_layers("num_hidden_layers", layers),
        hidden=hidden,
        intermediate=config.count("intermediate_size", intermediate),
        num_heads=heads,
        num_kv_heads=config.optional_count("num_key_value_heads", kv_heads) or heads,
        head_dim=config.optional_count("head_dim", head_dim)
        or config.require_divisible("hidden_size", hidden, heads, "num_attention_heads"),
        vocab=config.count("vocab_size", vocab),
        max_context=config.count("max_position_embeddings", context),
        activation=config.text(activation_key) or activation,
    )


def read_experts(
    config: Config,
    key: str,
    num_experts: int,
    *,
    per_token: int,
    width: int,
    alias: str | None = None,
    per_token_key: str = "num_experts_per_tok",
    width_key: str = "moe_intermediate_size",
    shared_width: int = 0,
) -> Experts:
    """The mixture under its keys; the numbers are the model type's defaults."""
    num_experts = config.count(key, num_experts, alias=alias)
    return Experts(
        num_experts,
        config.count(per_token_key, per_token, maximum=num_experts),
        config.count(width_key, width),
        shared_width,
    )


def attention(
    name: str, sizes: Sizes, *, qkv_bias: bool = False, out_bias: bool = False, out: str = "o_proj"
) -> Tensors:
    """Separate query, key and value projections and the output projection `out`."""
    return (
        *linear(f"{name}.q_proj", sizes.query_width, sizes.hidden, bias=qkv_bias),
        *linear(f"{name}.k_proj", sizes.kv_width, sizes.hidden, bias=qkv_bias),
        *linear(f"{name}.v_proj", sizes.kv_width, sizes.hidden, bias=qkv_bias),
        *linear(f"{name}.{out}", sizes.hidden, sizes.query_width, bias=out_bias),
    )


def head_norms(name: str, sizes: Sizes, *, separate: bool = False) -> Tensors:
    """Norms of each query and key head: one weight for all heads, or `separate` ones."""
    query: tuple[int, ...] = (sizes.head_dim,)
    key: tuple[int, ...] = (sizes.head_dim,)
    if separate:
        query, key = (sizes.num_heads, *query), (sizes.num_kv_heads, *key)
    return (
        ModelTensor(f"{name}.q_norm.weight", query, "norm"),
        ModelTensor(f"{name}.k_norm.weight", key, "norm"),
    )


def gated_mlp(name: str, sizes: Sizes, *, width: int | None = None, bias: bool = False) -> Tensors:
    """down(activation(gate(x)) * up(x)), `width` wide, by default the model's intermediate size."""
    width = sizes.intermediate if width is None else width
    return (
        *linear(f"{name}.gate_proj", width, sizes.hidden, bias=bias),
        *linear(f"{name}.up_proj", width, sizes.hidden, bias=bias),
        *linear(f"{name}.down_proj", sizes.hidden, width, bias=bias),
    )


def routed_experts(
    name: str, mixture: Experts, hidden: int, *, transposed: bool = False, bias: bool = False
) -> Tensors:
    """The gated MLPs of all routed experts in two parameters, gate and up projection in one."""

    def merged(part: str, outputs: int, inputs: int) -> Tensors:
        return experts(
            f"{name}.{part}",
            mixture.num_experts,
            outputs,
            inputs,
            per_token=mixture.experts_per_token,
            transposed=transposed,
            bias=bias,
        )

    width = mixture.intermediate_size
    return (
        *merged("gate_up_proj", 2 * width, hidden),
        *merged("down_proj", hidden, width),
    )


def router(name: str, mixture: Experts, hidden: int) -> Tensors:
    """What scores the experts for a token: a matrix in a module of its own, never quantized."""
    return parameter(f"{name}.weight", mixture.num_experts, hidden)


def plain_mlp(up: str, down: str, hidden: int, intermediate: int, *, bias: bool = True) -> Tensors:
    """down(activation(up(x)))."""
    return (
        *linear(up, intermediate, hidden, bias=bias),
        *linear(down, hidden, intermediate, bias=bias),
    )


def norms(layer: str, width: int, *names: str, bias: bool = False) -> Tensors:
    """The layer's own norms, all of the same width."""
    return tuple(tensor for name in names for tensor in norm(f"{layer}.{name}", width, bias=bias))


def stack(name: str, layers: Sequence[Layer]) -> Tensors:
    """Layers on top of each other: `name`.0, `name`.1, ..."""
    return tuple(tensor for i, layer in enumerate(layers) for tensor in layer(f"{name}.{i}"))


def layer_types(
    config: Config,
    num_layers: int,
    default: Callable[[int], str],
    known: Sequence[str],
    *,
    key: str = "layer_types",
) -> list[str]:
    """What each layer is: the config's list under `key`, else `default(index)`."""
    given = config.items(key)
    if given is None:
        return [default(index) for index in range(num_layers)]
    types = [_OLD_LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    if len(types) != num_layers or not all(kind in known for kind in types):
        config.reject(key, given, f"{num_layers} of {', '.join(known)}")
    return types


def layer_indices(config: Config, key: str) -> frozenset[int] | None:
    """The layers that a list in the config names by their numbers; None without that list."""
    given = config.items(key)
    if given is None:
        return None
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in given):
        config.reject(key, given, "a list of layer numbers")
    return frozenset(given)


def attention_cache(
    config: Config,
    sizes: Sizes,
    *,
    window: int | None = None,
    enabled: bool = True,
    sliding: Callable[[int], bool] = lambda index: True,
) -> tuple[CacheLayer, ...]:
    """What each attention layer caches.

    `window` is the model type's default of `sliding_window`. Where it is set and `enabled`, the
    layers that `layer_types` names, or else those for which `sliding(index)` holds, keep no more
    tokens than that.
    """
    window = config.optional_count("sliding_window", window) if enabled else None
    kinds = layer_types(
        config,
        sizes.num_layers,
        lambda index: "sliding_attention" if sliding(index) else "full_attention",
        ("full_attention", "sliding_attention"),
    )
    return tuple(
        AttentionCache(
            sizes.num_kv_heads,
            sizes.head_dim,
            sizes.head_dim,
            window if kind == "sliding_attention" else None,
        )
        for kind in kinds
    )


def whole_context(sizes: Sizes) -> tuple[CacheLayer, ...]:
    """Every layer caches the whole context."""
    layer = AttentionCache(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
    return (layer,) * sizes.num_layers


def decoder(
    config: Config,
    sizes: Sizes,
    layers: Sequence[Layer],
    cache_layers: tuple[CacheLayer, ...],
    *,
    root: str = "model",
    final_norm: Tensors | None = None,
    tied: bool = False,
    head_bias: bool = False,
    stored_names: StoredNames = PLAIN_NAMES,
    experts: Experts | None = None,
    unmodelled: tuple[str, ...] = (),
) -> Body:
    """The usual body: `root`.embed_tokens, `root`.layers.N and `root`.norm (or `final_norm`).

    `tied` is the model type's default of `tie_word_embeddings`.
    """
    return Body(
        sizes=sizes,
        tensors=(
            *embedding(f"{root}.embed_tokens", sizes.vocab, sizes.hidden),
            *stack(f"{root}.layers", layers),
            *(norm(f"{root}.norm", sizes.hidden) if final_norm is None else final_norm),
        ),
        embedding=f"{root}.embed_tokens",
        head_inputs=sizes.hidden,
        head_bias=head_bias,
        tied=config.flag("tie_word_embeddings", tied),
        cache_layers=cache_layers,
        stored_names=stored_names,
        experts=experts,
        unmodelled=unmodelled,
    )
