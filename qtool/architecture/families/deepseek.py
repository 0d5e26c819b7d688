"""DeepSeek V2 to V3.2, Kimi K2 and GLM-5: multi-head latent attention, and from some layer on a
mixture of routed and shared experts.

The keyword arguments of the readers below are transformers' defaults for the model type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtool.architecture.cache import LatentCache
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PRE_NORMS,
    ROTARY_BUFFER,
    USUAL_ACTIVATION,
    Body,
    Layer,
    Sizes,
    decoder,
    gated_mlp,
    layer_types,
    norms,
    routed_experts,
    router,
)
from qtool.architecture.families.moe import MTP, ROUTER_BUFFER
from qtool.architecture.parts import Tensors, linear, norm
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

# What quantized checkpoints store beside, or in place of, a weight.
PACKED_WEIGHTS = (
    (r"\.(weight_scale_inv|scale)$", "block scales of a checkpoint in fp8 or fp4"),
    (r"\.weight_(packed|scale|shape)$", "a weight in the packed format of compressed-tensors"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Widths of multi-head latent attention. A query or key head has a part without positions and
    a rotated one; the rotated part of the key is the same in all heads."""

    query_rank: int | None  # None: queries are projected in one step
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Width of a query head."""
        return self.plain_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class Indexer:
    """Sparse attention's indexer: how many query heads score a token, and how wide its key is."""

    num_heads: int
    head_dim: int


def deepseek_v2(config: Config) -> Body:
    """deepseek_v2 (DeepSeek-V2, V2-Lite, Coder-V2)."""
    latent = _latent(config, query_rank=1536)
    sizes = _sizes(
        config,
        latent,
        hidden=4096,
        intermediate=11008,
        layers=32,
        heads=32,
        vocab=102400,
        context=2048,
    )
    config.require_divisible("hidden_size", sizes.hidden, sizes.num_heads, "num_attention_heads")
    mixture = _mixture(config, ("num_experts",), routed=64, chosen=None, width=1407, shared=2)
    dense = config.whole("first_k_dense_replace", 0)
    mlp_bias = config.flag("mlp_bias", False)
    return _body(config, sizes, latent, mixture, _dense_first(sizes, dense), mlp_bias=mlp_bias)


def deepseek_v3(config: Config, root: str = "model") -> Body:
    """deepseek_v3 (DeepSeek-V3, R1), and kimi_k2, which transformers reads as deepseek_v3."""
    latent = _latent(config, query_rank=1536)
    sizes = _sizes(
        config,
        latent,
        hidden=7168,
        intermediate=18432,
        layers=61,
        heads=128,
        vocab=129280,
        context=4096,
    )
    mixture = _mixture(config, ("num_local_experts",), routed=256, chosen=8, width=2048, shared=1)
    sparse = _dense_first(sizes, config.whole("first_k_dense_replace", 3))
    return _body(config, sizes, latent, mixture, sparse, root=root)


def deepseek_v32(config: Config) -> Body:
    """deepseek_v32 (DeepSeek-V3.2): V3 whose layers each pick their tokens with an indexer."""
    latent = _latent(config, query_rank=1536)
    sizes = _sizes(
        config,
        latent,
        hidden=7168,
        intermediate=18432,
        layers=61,
        heads=128,
        vocab=129280,
        context=163840,
    )
    indexers = [_indexer(config, heads=64)] * sizes.num_layers
    return _sparse_attention(config, sizes, latent, indexers)


def glm_moe_dsa(config: Config) -> Body:
    """glm_moe_dsa (GLM-5): as deepseek_v32, but some layers reuse an earlier layer's tokens."""
    latent = _latent(config, query_rank=2048, plain=192, value=256)
    sizes = _sizes(
        config,
        latent,
        hidden=6144,
        intermediate=12288,
        layers=78,
        heads=64,
        vocab=154880,
        context=202752,
    )
    own = _indexer(config, heads=32)
    indexers = [own if full else None for full in _runs_indexer(config, sizes.num_layers)]
    return _sparse_attention(config, sizes, latent, indexers)


def _latent(config: Config, *, query_rank: int, plain: int = 128, value: int = 128) -> Latent:
    return Latent(
        query_rank=config.optional_count("q_lora_rank", query_rank),
        kv_rank=config.count("kv_lora_rank", 512),
        plain_dim=config.count("qk_nope_head_dim", plain),
        rope_dim=config.count("qk_rope_head_dim", 64),
        value_dim=config.count("v_head_dim", value),
    )


def _sizes(
    config: Config,
    latent: Latent,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    vocab: int,
    context: int,
) -> Sizes:
    """The usual sizes; a head is as wide as its query, whatever `head_dim` says."""
    heads = config.count("num_attention_heads", heads)
    return Sizes(
        num_layers=config.num_layers("num_hidden_layers", layers),
        hidden=config.count("hidden_size", hidden),
        intermediate=config.count("intermediate_size", intermediate),
        num_heads=heads,
        num_kv_heads=config.optional_count("num_key_value_heads") or heads,
        head_dim=latent.query_dim,
        vocab=config.count("vocab_size", vocab),
        max_context=config.count("max_position_embeddings", context),
        activation=config.text("hidden_act") or USUAL_ACTIVATION,
    )


def _mixture(
    config: Config,
    aliases: Sequence[str],
    *,
    routed: int,
    chosen: int | None,
    width: int,
    shared: int,
) -> Experts:
    """The mixture's sizes. `aliases` are transformers' other names for `n_routed_experts`, each
    of which wins over those before it; no `chosen` default means that a token uses all."""
    num_experts = config.count("n_routed_experts", routed)
    for alias in aliases:
        num_experts = config.optional_count(alias) or num_experts
    width = config.count("moe_intermediate_size", width)
    return Experts(
        num_experts=num_experts,
        experts_per_token=config.optional_count("num_experts_per_tok", chosen, maximum=num_experts)
        or num_experts,
        intermediate_size=width,
        shared_intermediate_size=width * config.count("n_shared_experts", shared),
    )


def _dense_first(sizes: Sizes, num_dense: int) -> list[bool]:
    """Which layers have experts: all but the first `num_dense`."""
    return [index >= num_dense for index in range(sizes.num_layers)]


def _indexer(config: Config, *, heads: int) -> Indexer:
    return Indexer(config.count("index_n_heads", heads), config.count("index_head_dim", 128))


def _runs_indexer(config: Config, num_layers: int) -> list[bool]:
    """Which layers pick tokens themselves: a list, a pattern of F and S, or every so many."""
    key = "indexer_types"
    kinds = config.items(key)
    if kinds is None:
        key = "index_topk_pattern"
        kinds = config.pattern(key, {"F": "full", "S": "shared"})
    if kinds is None:
        period = config.whole("index_topk_freq", 1) or 1
        offset = config.whole("index_skip_topk_offset", 2)
        return [max(index - offset + 1, 0) % period == 0 for index in range(num_layers)]
    if len(kinds) < num_layers or not all(kind in ("full", "shared") for kind in kinds):
        config.reject(key, kinds, f"at least {num_layers} of full, shared")
    return [kind == "full" for kind in kinds[:num_layers]]


def _sparse_attention(
    config: Config, sizes: Sizes, latent: Latent, indexers: Sequence[Indexer | None]
) -> Body:
    """The part that DeepSeek-V3.2 and GLM-5 share."""
    if latent.query_rank is None:
        config.reject("q_lora_rank", None, "a whole number from 1")
    layer_types(config, sizes.num_layers, lambda index: "indexed_attention", ("indexed_attention",))
    mixture = _mixture(
        config, ("num_experts", "num_local_experts"), routed=256, chosen=8, width=2048, shared=1
    )
    kinds = config.items("mlp_layer_types")
    if kinds is None:
        sparse = _dense_first(sizes, config.whole("first_k_dense_replace", 3))
    elif len(kinds) == sizes.num_layers and all(kind in ("dense", "sparse") for kind in kinds):
        sparse = [kind == "sparse" for kind in kinds]
    else:
        config.reject("mlp_layer_types", kinds, f"{sizes.num_layers} of dense, sparse")
    return _body(config, sizes, latent, mixture, sparse, indexers=indexers)


def _body(
    config: Config,
    sizes: Sizes,
    latent: Latent,
    mixture: Experts,
    sparse: Sequence[bool],
    *,
    indexers: Sequence[Indexer | None] | None = None,
    mlp_bias: bool = False,
    root: str = "model",
) -> Body:
    """The decoder; `sparse` and `indexers` have an entry for every layer."""
    bias = config.flag("attention_bias", False)
    indexers = [None] * sizes.num_layers if indexers is None else indexers

    def layer_of(has_experts: bool, indexer: Indexer | None) -> Layer:
        def layer(name: str) -> Tensors:
            own = f"{name}.mlp"
            return (
                *_latent_attention(f"{name}.self_attn", sizes, latent, bias=bias),
                *([] if indexer is None else _index(f"{name}.self_attn", sizes, latent, indexer)),
                *(
                    _moe(own, sizes, mixture, bias=mlp_bias)
                    if has_experts
                    else gated_mlp(own, sizes, bias=mlp_bias)
                ),
                *norms(name, sizes.hidden, *PRE_NORMS),
            )

        return layer

    return decoder(
        config,
        sizes,
        [layer_of(*kind) for kind in zip(sparse, indexers, strict=True)],
        tuple(
            LatentCache(latent.kv_rank, latent.rope_dim, indexer.head_dim if indexer else 0)
            for indexer in indexers
        ),
        root=root,
        stored_names=_names(sizes.num_layers),
        experts=mixture if any(sparse) else None,
    )


def _names(num_layers: int) -> StoredNames:
    extra = rf"^model\.layers\.{num_layers}\."
    return StoredNames(
        "model",
        renames=PER_EXPERT,
        ignored=(
            (extra, MTP[1]),
            ROTARY_BUFFER,
            ROUTER_BUFFER,
            *PACKED_WEIGHTS,
        ),
    )


def _latent_attention(name: str, sizes: Sizes, latent: Latent, *, bias: bool) -> Tensors:
    """Queries through a narrow projection (or directly), keys and values through the latent."""
    queries, rank = sizes.num_heads * latent.query_dim, latent.query_rank
    values = sizes.num_heads * latent.value_dim
    keys_and_values = sizes.num_heads * latent.plain_dim + values
    if rank is None:
        query = linear(f"{name}.q_proj", queries, sizes.hidden)
    else:
        query = (
            *linear(f"{name}.q_a_proj", rank, sizes.hidden, bias=bias),
            *norm(f"{name}.q_a_layernorm", rank),
            *linear(f"{name}.q_b_proj", queries, rank),
        )
    compressed = latent.kv_rank + latent.rope_dim
    return (
        *query,
        *linear(f"{name}.kv_a_proj_with_mqa", compressed, sizes.hidden, bias=bias),
        *norm(f"{name}.kv_a_layernorm", latent.kv_rank),
        *linear(f"{name}.kv_b_proj", keys_and_values, latent.kv_rank),
        *linear(f"{name}.o_proj", sizes.hidden, values, bias=bias),
    )


def _index(name: str, sizes: Sizes, latent: Latent, indexer: Indexer) -> Tensors:
    """The indexer. transformers keeps its last projection from every quantization."""
    own, width = f"{name}.indexer", indexer.num_heads * indexer.head_dim
    return (
        *linear(f"{own}.wq_b", width, latent.query_rank or 0),
        *linear(f"{own}.wk", indexer.head_dim, sizes.hidden),
        *norm(f"{own}.k_norm", indexer.head_dim, bias=True),
        *linear(f"{own}.weights_proj", indexer.num_heads, sizes.hidden, replaceable=False),
    )


def _moe(name: str, sizes: Sizes, mixture: Experts, *, bias: bool = False) -> Tensors:
    """Routed experts, their router, and the shared experts as one MLP that every token passes."""
    shared = mixture.shared_intermediate_size
    return (
        *routed_experts(f"{name}.experts", mixture, sizes.hidden),
        *router(f"{name}.gate", mixture, sizes.hidden),
        *gated_mlp(f"{name}.shared_experts", sizes, width=shared, bias=bias),
    )
