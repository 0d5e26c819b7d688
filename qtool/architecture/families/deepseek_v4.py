"""DeepSeek-V4: one head of keys that are values too, compressed beyond a window; hash-routed and
learned mixtures; several residual streams, mixed before and after every block."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.architecture.cache import AttentionCache, CacheLayer, CompressedCache
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
    norms,
    routed_experts,
    router,
)
from qtool.architecture.families.deepseek import PACKED_WEIGHTS
from qtool.architecture.families.moe import MTP, ROUTER_BUFFER
from qtool.architecture.parts import Tensors, linear, norm, parameter
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

_SLIDING, _SPARSE, _HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
# What the published configs write instead of a layer type.
_RATIOS = {0: _SLIDING, 4: _SPARSE, 128: _HEAVY}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """Widths beside those of `Sizes`; `rates` are the tokens per compressed entry."""

    query_rank: int
    out_groups: int
    out_rank: int
    window: int
    index_heads: int
    index_head_dim: int
    rates: dict[str, int]


def deepseek_v4(config: Config) -> Body:
    """deepseek_v4."""
    sizes = _sizes(config)
    attention = _read_attention(config, sizes)
    mixture = _read_mixture(config, sizes)
    streams = config.count("hc_mult", 4)
    bias = config.flag("mlp_bias", False)
    kinds = _layer_kinds(config, sizes.num_layers)

    def layer_of(kind: str) -> Layer:
        def layer(name: str) -> Tensors:
            return (
                *_attention(f"{name}.self_attn", sizes, attention, kind),
                *_moe(f"{name}.mlp", sizes, mixture, bias=bias),
                *norms(name, sizes.hidden, *PRE_NORMS),
                *_connection(f"{name}.attn_hc", streams, sizes.hidden),
                *_connection(f"{name}.ffn_hc", streams, sizes.hidden),
            )

        return layer

    return decoder(
        config,
        sizes,
        [layer_of(kind) for kind in kinds],
        tuple(_cache(sizes, attention, kind) for kind in kinds),
        final_norm=(
            *norm("model.norm", sizes.hidden),
            *parameter("model.hc_head.hc_fn", streams, streams * sizes.hidden),
            *parameter("model.hc_head.hc_base", streams),
            *parameter("model.hc_head.hc_scale", 1),
        ),
        stored_names=_NAMES,
        experts=mixture,
    )


def _sizes(config: Config) -> Sizes:
    return Sizes(
        num_layers=config.num_layers("num_hidden_layers", 43),
        hidden=config.count("hidden_size", 4096),
        intermediate=config.count("moe_intermediate_size", 2048, alias="intermediate_size"),
        num_heads=config.count("num_attention_heads", 64),
        num_kv_heads=1,
        head_dim=config.count("head_dim", 512),
        vocab=config.count("vocab_size", 129280),
        max_context=config.count("max_position_embeddings", 1048576),
        activation=config.text("hidden_act") or USUAL_ACTIVATION,
    )


def _read_attention(config: Config, sizes: Sizes) -> _Attention:
    groups = config.count("o_groups", 8)
    if sizes.query_width % groups:
        expected = f"a divisor of num_attention_heads * head_dim ({sizes.query_width})"
        config.reject("o_groups", groups, expected)
    rates = config.section("compress_rates")
    return _Attention(
        query_rank=config.count("q_lora_rank", 1024),
        out_groups=groups,
        out_rank=config.count("o_lora_rank", 1024),
        window=config.count("sliding_window", 128),
        index_heads=config.count("index_n_heads", 64),
        index_head_dim=config.count("index_head_dim", 128),
        rates={
            _SPARSE: config.optional_count("compress_rate_csa") or rates.count(_SPARSE, 4),
            _HEAVY: config.optional_count("compress_rate_hca") or rates.count(_HEAVY, 128),
        },
    )


def _read_mixture(config: Config, sizes: Sizes) -> Experts:
    num_experts = config.count("n_routed_experts", 256, alias="num_local_experts")
    return Experts(
        num_experts=num_experts,
        experts_per_token=config.count("num_experts_per_tok", 6, maximum=num_experts),
        intermediate_size=sizes.intermediate,
        shared_intermediate_size=sizes.intermediate,
    )


def _layer_kinds(config: Config, num_layers: int) -> list[str]:
    """What each layer's attention is; lists may go on for layers that predict further tokens."""
    key = "layer_types"
    kinds = config.items(key)
    if kinds is None and (ratios := config.items("compress_ratios")) is not None:
        key = "compress_ratios"
        kinds = [_RATIOS.get(ratio) if isinstance(ratio, int) else None for ratio in ratios]
    if kinds is None:
        kinds = [_HEAVY if index < 2 or index % 2 == 0 else _SPARSE for index in range(num_layers)]
    if len(kinds) < num_layers or not all(kind in _RATIOS.values() for kind in kinds):
        known = _RATIOS if key == "compress_ratios" else _RATIOS.values()
        expected = f"at least {num_layers} of {', '.join(map(str, known))}"
        config.reject(key, config.items(key), expected)
    return list(kinds[:num_layers])


def _attention(name: str, sizes: Sizes, attention: _Attention, kind: str) -> Tensors:
    """The output projection is a product of two; the first, in groups, is a subclass of nn.Linear
    whose weight has the inputs of one group."""
    rank, out = attention.query_rank, attention.out_groups * attention.out_rank
    group_inputs = sizes.query_width // attention.out_groups
    return (
        *parameter(f"{name}.sinks", sizes.num_heads),
        *linear(f"{name}.q_a_proj", rank, sizes.hidden),
        *norm(f"{name}.q_a_norm", rank),
        *linear(f"{name}.q_b_proj", sizes.query_width, rank),
        *linear(f"{name}.kv_proj", sizes.head_dim, sizes.hidden),
        *norm(f"{name}.kv_norm", sizes.head_dim),
        *linear(f"{name}.o_a_proj", out, group_inputs, replaceable=False),
        *linear(f"{name}.o_b_proj", sizes.hidden, out),
        *_compressor(f"{name}.compressor", sizes, attention, kind),
    )


def _compressor(name: str, sizes: Sizes, attention: _Attention, kind: str) -> Tensors:
    if kind == _SLIDING:
        return ()
    rate, head_dim = attention.rates[kind], sizes.head_dim
    if kind == _HEAVY:
        return _pooling(name, sizes.hidden, rate, head_dim, series=1)
    own, width = f"{name}.indexer", attention.index_heads * attention.index_head_dim
    scorer = f"{own}.scorer.weights_proj"
    return (
        *_pooling(name, sizes.hidden, rate, head_dim, series=2),
        *_pooling(own, sizes.hidden, rate, attention.index_head_dim, series=2),
        *linear(f"{own}.q_b_proj", width, attention.query_rank),
        *linear(scorer, attention.index_heads, sizes.hidden, replaceable=False),
    )


def _pooling(name: str, hidden: int, rate: int, head_dim: int, *, series: int) -> Tensors:
    """What makes one entry of `rate` tokens, from `series` overlapping sequences of them. The
    class keeps its projections from every quantization."""
    width = series * head_dim
    return (
        *parameter(f"{name}.position_bias", rate, width),
        *linear(f"{name}.kv_proj", width, hidden, replaceable=False),
        *linear(f"{name}.gate_proj", width, hidden, replaceable=False),
        *norm(f"{name}.kv_norm", head_dim),
    )


def _moe(name: str, sizes: Sizes, mixture: Experts, *, bias: bool) -> Tensors:
    return (
        *router(f"{name}.gate", mixture, sizes.hidden),
        *routed_experts(f"{name}.experts", mixture, sizes.hidden),
        *gated_mlp(f"{name}.shared_experts", sizes, bias=bias),
    )


def _connection(name: str, streams: int, hidden: int) -> Tensors:
    """The weights that collapse, expand and mix the residual streams."""
    width = (2 + streams) * streams
    return (
        *parameter(f"{name}.fn", width, streams * hidden),
        *parameter(f"{name}.base", width),
        *parameter(f"{name}.scale", 3),
    )


def _cache(sizes: Sizes, attention: _Attention, kind: str) -> CacheLayer:
    head_dim, window = sizes.head_dim, attention.window
    if kind == _SLIDING:
        return AttentionCache(1, head_dim, head_dim, window)
    rate = attention.rates[kind]
    if kind == _HEAVY:
        return CompressedCache(head_dim, window, rate, head_dim, 2 * head_dim)
    entry = head_dim + attention.index_head_dim
    return CompressedCache(head_dim, window, rate, entry, 4 * entry, rate * entry)


# The published checkpoints keep the names of DeepSeek's own code.
_NAMES = StoredNames(
    "model",
    renames=(
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"^embed\.", "embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn_sink$", ".sinks"),
        (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
        (r"\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
        (r"\.norm\.", ".kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_(a|b)\.", r".o_\1_proj."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        *PER_EXPERT,
    ),
    ignored=(
        MTP,
        (r"\.gate\.bias$", ROUTER_BUFFER[1]),
        (r"\.gate\.tid2eid$", "the table of the hash router, not a parameter"),
        ROTARY_BUFFER,
        ROUTER_BUFFER,
        *PACKED_WEIGHTS,
    ),
)
