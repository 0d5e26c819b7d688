"""ERNIE 4.5 with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    ROTARY_BUFFER,
    Body,
    attention,
    gated_mlp,
    read_experts,
    read_sizes,
    routed_experts,
    router,
)
from qtool.architecture.families.moe import (
    MTP,
    block,
    choose_layers,
    dense_mlp,
    sparse_decoder,
)
from qtool.architecture.parts import Tensors, parameter
from qtool.architecture.stored_names import PER_EXPERT, StoredNames


def ernie4_5_moe(config: Config) -> Body:
    """ernie4_5_moe: the router's correction is a parameter, shared experts may be absent."""
    sizes = read_sizes(
        config,
        hidden=2560,
        intermediate=12288,
        layers=28,
        heads=20,
        kv_heads=4,
        vocab=103424,
        context=131072,
    )
    bias = config.flag("use_bias", False)
    mixture = read_experts(
        config,
        "moe_num_experts",
        64,
        alias="num_experts",
        per_token=6,
        per_token_key="moe_k",
        width=1536,
    )
    shared = config.whole("moe_num_shared_experts", 2) * mixture.intermediate_size
    mixture = replace(mixture, shared_intermediate_size=shared)

    def mixer(name: str) -> Tensors:
        return attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias)

    def sparse(name: str) -> Tensors:
        own, statics = f"{name}.mlp", f"{name}.mlp.gate.moe_statics"
        shared_mlp = gated_mlp(f"{own}.shared_experts", sizes, width=shared, bias=bias)
        return (
            *router(f"{own}.gate", mixture, sizes.hidden),
            *parameter(f"{statics}.e_score_correction_bias", 1, mixture.num_experts),
            *routed_experts(f"{own}.experts", mixture, sizes.hidden),
            *(shared_mlp if shared else ()),
        )

    layers = choose_layers(
        block(sizes, mixer, dense_mlp(sizes, bias=bias)),
        block(sizes, mixer, sparse),
        _ernie_sparse(config, sizes.num_layers),
    )
    return sparse_decoder(
        config, sizes, mixture, layers, tied=True, head_bias=bias, names=_ERNIE_NAMES
    )


def _ernie_sparse(config: Config, num_layers: int) -> list[bool]:
    first, step = config.whole("moe_layer_start_index", 1), config.count("moe_layer_interval", 1)
    last = config.whole("moe_layer_end_index", -1, minimum=-1)
    last = num_layers - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % step == 0 for i in range(num_layers)]


_ERNIE_NAMES = StoredNames(
    "model",
    renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."), *PER_EXPERT),
    ignored=(ROTARY_BUFFER, MTP),
)
