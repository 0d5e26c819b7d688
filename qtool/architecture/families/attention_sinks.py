"""Mixtures whose attention has sinks, one learned logit per head: gpt-oss and MiMo V2 Flash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qtool.architecture.cache import AttentionCache, CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PRE_NORMS,
    ROTARY_BUFFER,
    Body,
    Layer,
    Sizes,
    attention,
    attention_cache,
    layer_types,
    norms,
    read_experts,
    read_sizes,
    routed_experts,
)
from qtool.architecture.families.moe import (
    EXPERT_NAMES,
    block,
    dense_mlp,
    experts_then_gate,
    sparse_decoder,
)
from qtool.architecture.parts import Tensors, linear, parameter
from qtool.architecture.records import ModelTensor
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

# Published in MXFP4: four-bit values in blocks, and the blocks' scales.
_GPT_OSS_NAMES = StoredNames(
    "model",
    renames=((r"\.experts\.(gate_up_proj|down_proj)_(?:blocks|scales)$", r".experts.\1"),),
    ignored=(ROTARY_BUFFER,),
)


def gpt_oss(config: Config) -> Body:
    """gpt_oss: biases everywhere, experts stored transposed, every other layer slides."""
    sizes = read_sizes(
        config,
        hidden=2880,
        intermediate=2880,
        layers=36,
        heads=64,
        kv_heads=8,
        head_dim=64,
        vocab=201088,
        context=131072,
    )
    mixture = read_experts(
        config,
        "num_local_experts",
        128,
        alias="num_experts",
        per_token=4,
        width=2880,
        width_key="intermediate_size",
    )
    bias = config.flag("attention_bias", True)

    def layer(name: str) -> Tensors:
        mlp = f"{name}.mlp"
        return (
            *parameter(f"{name}.self_attn.sinks", sizes.num_heads),
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *parameter(f"{mlp}.router.weight", mixture.num_experts, sizes.hidden),
            ModelTensor(f"{mlp}.router.bias", (mixture.num_experts,), "bias"),
            *routed_experts(f"{mlp}.experts", mixture, sizes.hidden, transposed=True, bias=True),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(config, sizes, window=128, sliding=lambda index: index % 2 == 0)
    layers = [layer] * sizes.num_layers
    return sparse_decoder(config, sizes, mixture, layers, cache=cache, names=_GPT_OSS_NAMES)


def mimo_v2_flash(config: Config) -> Body:
    """mimo_v2_flash: five of six layers slide, with twice the key-value heads and a sink per head;
    values are narrower than keys."""
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=16384,
        layers=48,
        heads=64,
        kv_heads=4,
        head_dim=192,
        vocab=152576,
        context=131072,
    )
    mixture = read_experts(
        config, "n_routed_experts", 256, alias="num_local_experts", per_token=8, width=2048
    )
    value_dim = config.count("v_head_dim", 128)
    kinds = layer_types(
        config,
        sizes.num_layers,
        lambda i: "full_attention" if i == 0 or (i + 1) % 6 == 0 else "sliding_attention",
        ("full_attention", "sliding_attention"),
    )
    mlps = layer_types(
        config,
        sizes.num_layers,
        lambda i: "sparse" if i else "dense",
        ("dense", "sparse"),
        key="mlp_layer_types",
    )
    mixers = {
        "full_attention": _mimo_attention(config, sizes, value_dim, sliding=False),
        "sliding_attention": _mimo_attention(config, sizes, value_dim, sliding=True),
    }
    mlp_of = {"dense": dense_mlp(sizes), "sparse": experts_then_gate(sizes, mixture)}
    return sparse_decoder(
        config,
        sizes,
        mixture,
        [block(sizes, mixers[kind], mlp_of[mlp]) for kind, mlp in zip(kinds, mlps, strict=True)],
        cache=_mimo_cache(config, sizes, value_dim, kinds),
        names=_MIMO_NAMES,
    )


def _mimo_attention(config: Config, sizes: Sizes, value_dim: int, *, sliding: bool) -> Layer:
    bias = config.flag("attention_bias", False)
    kv_heads = sizes.num_kv_heads * (2 if sliding else 1)

    def mixer(name: str) -> Tensors:
        own, hidden = f"{name}.self_attn", sizes.hidden
        return (
            *(parameter(f"{own}.sinks", sizes.num_heads) if sliding else ()),
            *linear(f"{own}.q_proj", sizes.query_width, hidden, bias=bias),
            *linear(f"{own}.k_proj", kv_heads * sizes.head_dim, hidden, bias=bias),
            *linear(f"{own}.v_proj", kv_heads * value_dim, hidden, bias=bias),
            *linear(f"{own}.o_proj", hidden, sizes.num_heads * value_dim),
        )

    return mixer


def _mimo_cache(
    config: Config, sizes: Sizes, value_dim: int, kinds: Sequence[str]
) -> tuple[CacheLayer, ...]:
    # The published key counts the tokens before the query's own, transformers' window with it.
    before = config.optional_count("sliding_window_size")
    window = config.count("sliding_window", 129) if before is None else before + 1
    full = AttentionCache(sizes.num_kv_heads, sizes.head_dim, value_dim)
    sliding = replace(full, num_kv_heads=2 * sizes.num_kv_heads, window=window)
    return tuple(sliding if kind == "sliding_attention" else full for kind in kinds)


_MIMO_NAMES = replace(
    EXPERT_NAMES,
    renames=(*PER_EXPERT, (r"\.self_attn\.attention_sink_bias$", ".self_attn.sinks")),
)
