"""Mixtures of experts over ordinary attention: Mixtral and its relatives.

transformers keeps the weights of all routed experts of a layer in two parameters, whatever the
checkpoint stores; the router that picks among them is no linear layer. Shared experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qtool.architecture.cache import CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PRE_NORMS,
    ROTARY_BUFFER,
    Body,
    Layer,
    Sizes,
    attention,
    attention_cache,
    decoder,
    gated_mlp,
    head_norms,
    layer_indices,
    norms,
    read_experts,
    read_sizes,
    routed_experts,
    router,
)
from qtool.architecture.parts import Tensors, linear, norm
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

ROUTER_BUFFER = (r"\.e_score_correction_bias$", "the router's correction, a buffer of the model")
MTP = (r"^(model\.)?mtp\.", "the multi-token prediction layer, which transformers leaves out")
EXPERT_NAMES = StoredNames("model", renames=PER_EXPERT, ignored=(ROTARY_BUFFER, ROUTER_BUFFER, MTP))
_MIXTRAL_NAMES = replace(EXPERT_NAMES, renames=((r"\.block_sparse_moe\.", ".mlp."), *PER_EXPERT))


def block(sizes: Sizes, mixer: Layer, mlp: Layer) -> Layer:
    """A layer of `mixer`, `mlp` and the two norms before them, each named by the function."""

    def layer(name: str) -> Tensors:
        return (*mixer(name), *mlp(name), *norms(name, sizes.hidden, *PRE_NORMS))

    return layer


def dense_mlp(sizes: Sizes, *, bias: bool = False) -> Layer:
    """A layer's MLP without experts."""
    return lambda name: gated_mlp(f"{name}.mlp", sizes, bias=bias)


def gate_then_experts(sizes: Sizes, mixture: Experts) -> Layer:
    """A layer's mixture; the router is registered first."""
    return lambda name: (
        *router(f"{name}.mlp.gate", mixture, sizes.hidden),
        *routed_experts(f"{name}.mlp.experts", mixture, sizes.hidden),
    )


def experts_then_gate(sizes: Sizes, mixture: Experts) -> Layer:
    """A layer's mixture; the router is registered last."""
    return lambda name: (
        *routed_experts(f"{name}.mlp.experts", mixture, sizes.hidden),
        *router(f"{name}.mlp.gate", mixture, sizes.hidden),
    )


def choose_layers(dense: Layer, sparse: Layer, is_sparse: Sequence[bool]) -> list[Layer]:
    """For every layer the `dense` or the `sparse` kind."""
    return [sparse if layer_is_sparse else dense for layer_is_sparse in is_sparse]


def sparse_decoder(
    config: Config,
    sizes: Sizes,
    mixture: Experts,
    layers: Sequence[Layer],
    *,
    cache: tuple[CacheLayer, ...] | None = None,
    names: StoredNames = EXPERT_NAMES,
    tied: bool = False,
    head_bias: bool = False,
) -> Body:
    """The usual `decoder` with a mixture; without `cache`, that of `attention_cache`."""
    return decoder(
        config,
        sizes,
        layers,
        attention_cache(config, sizes) if cache is None else cache,
        tied=tied,
        head_bias=head_bias,
        stored_names=names,
        experts=mixture,
    )


def mixtral(config: Config) -> Body:
    """mixtral: mistral with a mixture for an MLP."""
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=32000,
        context=131072,
    )
    mixture = _local_experts(config, sizes, 8, per_token=2)

    def mixer(name: str) -> Tensors:
        return attention(f"{name}.self_attn", sizes)

    layer = block(sizes, mixer, gate_then_experts(sizes, mixture))
    return sparse_decoder(config, sizes, mixture, [layer] * sizes.num_layers, names=_MIXTRAL_NAMES)


def minimax_m2(config: Config) -> Body:
    """minimax_m2: queries and keys are normed over their whole width."""
    sizes = read_sizes(
        config,
        hidden=3072,
        intermediate=1536,
        layers=62,
        heads=48,
        kv_heads=8,
        head_dim=128,
        vocab=200064,
        context=196608,
    )
    mixture = _local_experts(config, sizes, 256, per_token=8)

    def mixer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            *attention(own, sizes),
            *norm(f"{own}.q_norm", sizes.query_width),
            *norm(f"{own}.k_norm", sizes.kv_width),
        )

    layer = block(sizes, mixer, gate_then_experts(sizes, mixture))
    return sparse_decoder(config, sizes, mixture, [layer] * sizes.num_layers, names=_MIXTRAL_NAMES)


def olmoe(config: Config) -> Body:
    """olmoe: queries and keys are normed over their whole width."""
    sizes = read_sizes(
        config, hidden=2048, intermediate=2048, layers=16, heads=16, vocab=50304, context=4096
    )
    mixture = read_experts(
        config,
        "num_experts",
        64,
        alias="num_local_experts",
        per_token=8,
        width=sizes.intermediate,
        width_key="intermediate_size",
    )
    bias = config.flag("attention_bias", False)

    def mixer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            *attention(own, sizes, qkv_bias=bias, out_bias=bias),
            *norm(f"{own}.q_norm", sizes.hidden),
            *norm(f"{own}.k_norm", sizes.hidden // sizes.num_heads * sizes.num_kv_heads),
        )

    layer = block(sizes, mixer, gate_then_experts(sizes, mixture))
    return sparse_decoder(config, sizes, mixture, [layer] * sizes.num_layers)


def granitemoe(config: Config) -> Body:
    """granitemoe: the norms come before the mixture, under Mixtral's old name for it."""
    sizes = read_sizes(
        config, hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32000, context=2048
    )
    mixture = _local_experts(config, sizes, 8, per_token=2, alias=None)
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        mlp = f"{name}.block_sparse_moe"
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *norms(name, sizes.hidden, *PRE_NORMS),
            *router(f"{mlp}.router", mixture, sizes.hidden),
            *routed_experts(f"{mlp}.experts", mixture, sizes.hidden),
        )

    return sparse_decoder(config, sizes, mixture, [layer] * sizes.num_layers, names=_GRANITE_NAMES)


_GRANITE_NAMES = StoredNames(
    "model",
    renames=(
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
    ),
    ignored=(ROTARY_BUFFER,),
)


def qwen2_moe(config: Config) -> Body:
    """qwen2_moe: a shared expert beside the routed ones, weighed by a gate of its own."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=5632,
        layers=24,
        heads=16,
        kv_heads=16,
        vocab=151936,
        context=32768,
    )
    shared = config.count("shared_expert_intermediate_size", 5632)
    mixture = read_experts(config, "num_experts", 60, per_token=4, width=1408, shared_width=shared)
    bias = config.flag("qkv_bias", True)

    def mixer(name: str) -> Tensors:
        return attention(f"{name}.self_attn", sizes, qkv_bias=bias)

    first_full = config.whole("max_window_layers", 28)
    cache = attention_cache(
        config,
        sizes,
        window=4096,
        enabled=config.flag("use_sliding_window", False),
        sliding=lambda index: index % 2 == 0 and index < first_full,
    )
    layers = qwen_layers(config, sizes, mixer, gated_shared_expert(sizes, mixture))
    return sparse_decoder(config, sizes, mixture, layers, cache=cache)


def qwen3_moe(config: Config) -> Body:
    """qwen3_moe: qwen3 with a mixture for an MLP."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=6144,
        layers=24,
        heads=32,
        kv_heads=4,
        vocab=151936,
        context=32768,
    )
    mixture = read_experts(
        config, "num_experts", 128, alias="num_local_experts", per_token=8, width=768
    )
    enabled = config.flag("use_sliding_window", False)
    cache = attention_cache(config, sizes, window=4096, enabled=enabled)
    return sparse_decoder(config, sizes, mixture, qwen3_layers(config, sizes, mixture), cache=cache)


def qwen3_layers(config: Config, sizes: Sizes, mixture: Experts) -> list[Layer]:
    """The layers of qwen3_moe, and of qwen3_vl_moe's text decoder."""
    bias = config.flag("attention_bias", False)

    def mixer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            *attention(own, sizes, qkv_bias=bias, out_bias=bias),
            *head_norms(own, sizes),
        )

    return qwen_layers(config, sizes, mixer, experts_then_gate(sizes, mixture))


def qwen_layers(config: Config, sizes: Sizes, mixer: Layer, sparse: Layer) -> list[Layer]:
    """Every `decoder_sparse_step`-th layer has a mixture, but for the `mlp_only_layers`."""
    step = config.count("decoder_sparse_step", 1)
    dense_only = layer_indices(config, "mlp_only_layers") or frozenset()
    return choose_layers(
        block(sizes, mixer, dense_mlp(sizes)),
        block(sizes, mixer, sparse),
        [(i + 1) % step == 0 and i not in dense_only for i in range(sizes.num_layers)],
    )


def gated_shared_expert(sizes: Sizes, mixture: Experts) -> Layer:
    """The mixture of qwen2_moe, qwen3_next and qwen3_5_moe."""

    def mlp(name: str) -> Tensors:
        own, width = f"{name}.mlp", mixture.shared_intermediate_size
        return (
            *router(f"{own}.gate", mixture, sizes.hidden),
            *routed_experts(f"{own}.experts", mixture, sizes.hidden),
            *gated_mlp(f"{own}.shared_expert", sizes, width=width),
            *linear(f"{own}.shared_expert_gate", 1, sizes.hidden),
        )

    return mlp


def _local_experts(
    config: Config,
    sizes: Sizes,
    num_experts: int,
    *,
    per_token: int,
    alias: str | None = "num_experts",
) -> Experts:
    """A mixture whose experts have the width that other models give their MLP."""
    return read_experts(
        config,
        "num_local_experts",
        num_experts,
        alias=alias,
        per_token=per_token,
        width=sizes.intermediate,
        width_key="intermediate_size",
    )
