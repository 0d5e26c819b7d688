"""GLM 4, dense and with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    Body,
    attention,
    attention_cache,
    decoder,
    gated_mlp,
    head_norms,
    norms,
    read_experts,
    read_sizes,
)
from qtool.architecture.families.moe import (
    EXPERT_NAMES,
    MTP,
    block,
    choose_layers,
    dense_mlp,
    experts_then_gate,
    sparse_decoder,
)
from qtool.architecture.parts import Tensors, linear


def glm4(config: Config) -> Body:
    """glm4 (GLM-4-0414): gate and up projection in one, norms around attention and MLP."""
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=13696,
        layers=40,
        heads=32,
        kv_heads=2,
        head_dim=128,
        vocab=151552,
        context=131072,
    )
    bias = config.flag("attention_bias", True)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias),
            *linear(f"{name}.mlp.gate_up_proj", 2 * sizes.intermediate, sizes.hidden),
            *linear(f"{name}.mlp.down_proj", sizes.hidden, sizes.intermediate),
            *norms(name, sizes.hidden, "input_layernorm", "post_attention_layernorm"),
            *norms(name, sizes.hidden, "post_self_attn_layernorm", "post_mlp_layernorm"),
        )

    cache = attention_cache(config, sizes)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def glm4_moe(config: Config) -> Body:
    """glm4_moe (GLM 4.5 to 4.7): the first layers are dense, the others share an expert."""
    heads = config.count("num_attention_heads", 96)
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=10944,
        layers=46,
        heads=96,
        kv_heads=8,
        head_dim=config.count("hidden_size", 4096) // heads,  # any remainder is left over
        vocab=151552,
        context=131072,
    )
    mixture = read_experts(
        config, "n_routed_experts", 128, alias="num_local_experts", per_token=8, width=1408
    )
    num_shared = config.count("n_shared_experts", 1)
    mixture = replace(mixture, shared_intermediate_size=num_shared * mixture.intermediate_size)
    bias, qk_norm = config.flag("attention_bias", False), config.flag("use_qk_norm", False)

    def mixer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            *attention(own, sizes, qkv_bias=bias),
            *(head_norms(own, sizes) if qk_norm else ()),
        )

    def sparse(name: str) -> Tensors:
        own, width = f"{name}.mlp.shared_experts", mixture.shared_intermediate_size
        return (*experts_then_gate(sizes, mixture)(name), *gated_mlp(own, sizes, width=width))

    first_sparse = config.whole("first_k_dense_replace", 1)
    layers = choose_layers(
        block(sizes, mixer, dense_mlp(sizes)),
        block(sizes, mixer, sparse),
        [index >= first_sparse for index in range(sizes.num_layers)],
    )
    extra_layer = (rf"^(model\.)?layers\.{sizes.num_layers}\.", MTP[1])
    names = replace(EXPERT_NAMES, ignored=(extra_layer, *EXPERT_NAMES.ignored))
    return sparse_decoder(config, sizes, mixture, layers, names=names)
