"""Jamba and Nemotron-H: state-space layers with a few attention layers between them, and mixtures
of experts."""

from __future__ import annotations

from qtool.architecture.cache import AttentionCache, CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PLAIN_NAMES,
    Body,
    Layer,
    Sizes,
    attention,
    decoder,
    gated_mlp,
    norms,
    plain_mlp,
    read_sizes,
    routed_experts,
    router,
    stack,
)
from qtool.architecture.families.mamba import Mamba2Scan, SelectiveScan, time_step_rank
from qtool.architecture.families.moe import MTP, ROUTER_BUFFER
from qtool.architecture.parts import Tensors, embedding, experts, linear, norm
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

_ATTENTION, _STATE, _MOE, _MLP = "full_attention", "linear_attention", "moe", "mlp"


def jamba(config: Config) -> Body:
    """jamba: Mamba 1 with norms; attention and experts each in one layer of so many."""
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=65536,
        context=262144,
    )
    scan = _jamba_scan(config, sizes)
    mixture = _jamba_mixture(config, sizes)
    attends = _periodic(config, sizes, "attn_layer", period=8, offset=4)
    chooses = _periodic(config, sizes, "expert_layer", period=2, offset=1)
    if mixture.num_experts == 1:
        chooses = [False] * sizes.num_layers

    def layer_of(has_attention: bool, has_experts: bool) -> Layer:
        def layer(name: str) -> Tensors:
            own = f"{name}.feed_forward"
            return (
                *(
                    attention(f"{name}.self_attn", sizes)
                    if has_attention
                    else scan.mixer(f"{name}.mamba", normed=True)
                ),
                *(_jamba_moe(own, sizes, mixture) if has_experts else gated_mlp(own, sizes)),
                *norms(name, sizes.hidden, "input_layernorm", "pre_ff_layernorm"),
            )

        return layer

    keys = AttentionCache(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
    return decoder(
        config,
        sizes,
        [layer_of(*kind) for kind in zip(attends, chooses, strict=True)],
        tuple(keys if has_attention else scan.state for has_attention in attends),
        final_norm=norm("model.final_layernorm", sizes.hidden),
        stored_names=StoredNames("model", renames=PER_EXPERT, ignored=PLAIN_NAMES.ignored),
        experts=mixture if any(chooses) else None,
    )


def _jamba_scan(config: Config, sizes: Sizes) -> SelectiveScan:
    return SelectiveScan(
        hidden=sizes.hidden,
        inner=sizes.hidden * config.count("mamba_expand", 2),
        state_size=config.count("mamba_d_state", 16),
        rank=time_step_rank(config, "mamba_dt_rank", sizes.hidden),
        kernel=config.count("mamba_d_conv", 4),
        bias=config.flag("mamba_proj_bias", False),
        conv_bias=config.flag("mamba_conv_bias", True),
    )


def _jamba_mixture(config: Config, sizes: Sizes) -> Experts:
    num_experts = config.count("num_experts", 16, alias="num_local_experts")
    per_token = config.count("num_experts_per_tok", 2)
    return Experts(num_experts, min(per_token, num_experts), sizes.intermediate)


def _jamba_moe(name: str, sizes: Sizes, mixture: Experts) -> Tensors:
    return (
        *router(f"{name}.router", mixture, sizes.hidden),
        *routed_experts(f"{name}.experts", mixture, sizes.hidden),
    )


def _periodic(config: Config, sizes: Sizes, key: str, *, period: int, offset: int) -> list[bool]:
    """One layer in `key`_period, counted from `key`_offset."""
    period = config.count(f"{key}_period", period)
    offset = config.whole(f"{key}_offset", offset)
    if offset >= period:
        config.reject(f"{key}_offset", offset, f"less than {key}_period ({period})")
    return [index % period == offset for index in range(sizes.num_layers)]


def nemotron_h(config: Config) -> Body:
    """nemotron_h (Nemotron-H, Nemotron 3): every layer is one thing, Mamba 2, attention, an MLP or
    a mixture; the number of layers follows from their list. Its head is never tied."""
    kinds = _nemotron_layers(config)
    sizes = _nemotron_sizes(config, len(kinds))
    scan = _nemotron_scan(config, sizes)
    mixture = _nemotron_mixture(config)
    latent = config.optional_count("moe_latent_size")
    bias = config.flag("mlp_bias", False)

    def mixer(name: str, kind: str) -> Tensors:
        if kind == _STATE:
            return scan.mixer(name)
        if kind == _ATTENTION:
            return attention(name, sizes)
        if kind == _MOE:
            return _nemotron_moe(name, sizes.hidden, mixture, latent=latent, bias=bias)
        return _nemotron_mlp(name, sizes.hidden, sizes.intermediate, bias=bias)

    def layer_of(kind: str) -> Layer:
        return lambda name: (*norm(f"{name}.norm", sizes.hidden), *mixer(f"{name}.mixer", kind))

    keys = AttentionCache(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
    kept: dict[str, CacheLayer] = {_ATTENTION: keys, _STATE: scan.state}
    return Body(
        sizes=sizes,
        tensors=(
            *embedding("model.embeddings", sizes.vocab, sizes.hidden),
            *stack("model.layers", [layer_of(kind) for kind in kinds]),
            *norm("model.norm_f", sizes.hidden),
        ),
        embedding="model.embeddings",
        head_inputs=sizes.hidden,
        tied=False,
        cache_layers=tuple(kept[kind] for kind in kinds if kind in kept),
        stored_names=_NEMOTRON_NAMES,
        experts=mixture if _MOE in kinds else None,
    )


_NEMOTRON_NAMES = StoredNames(
    "model",
    renames=(
        (r"^backbone\.", "model."),
        (r"\.experts\.\d+\.(up|down)_proj\.weight$", r".experts.\1_proj"),
    ),
    ignored=(
        *PLAIN_NAMES.ignored,
        MTP,
        ROUTER_BUFFER,
    ),
)


def _nemotron_layers(config: Config) -> list[str]:
    """What each layer is: a list of words under either name, or a pattern of letters."""
    letters = {"M": _STATE, "E": _MOE, "*": _ATTENTION, "-": _MLP}
    given = [key for key in ("layer_types", "layers_block_type") if config.items(key) is not None]
    key = given[0] if given else "hybrid_override_pattern"
    kinds = config.pattern(key, letters)
    if kinds is None:
        kinds = [_STATE, _MOE, _ATTENTION, _MLP]
    older = {"attention": _ATTENTION, "mamba": _STATE}
    kinds = [older.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if not kinds or not all(kind in letters.values() for kind in kinds):
        config.reject(key, kinds, f"a list of {', '.join(letters.values())}")
    return kinds


def _nemotron_sizes(config: Config, num_layers: int) -> Sizes:
    heads = config.count("num_attention_heads", 32)
    return Sizes(
        num_layers=num_layers,
        hidden=config.count("hidden_size", 4096),
        intermediate=config.count("intermediate_size", 21504),
        num_heads=heads,
        num_kv_heads=config.optional_count("num_key_value_heads", 8) or heads,
        head_dim=config.count("head_dim", 128),
        vocab=config.count("vocab_size", 131072),
        max_context=config.count("max_position_embeddings", 4096),
        activation=config.text("mlp_hidden_act") or "relu2",
    )


def _nemotron_scan(config: Config, sizes: Sizes) -> Mamba2Scan:
    return Mamba2Scan(
        hidden=sizes.hidden,
        heads=config.count("mamba_num_heads", 128),
        head_dim=config.count("mamba_head_dim", 64),
        state_size=config.count("ssm_state_size", 128),
        groups=config.count("n_groups", 8, alias="mamba_n_groups"),
        kernel=config.count("conv_kernel", 4, alias="mamba_d_conv"),
        bias=config.flag("use_bias", False),
        conv_bias=config.flag("mamba_conv_bias", config.flag("use_conv_bias", True)),
    )


def _nemotron_mixture(config: Config) -> Experts:
    num_experts = config.count("n_routed_experts", 8, alias="num_local_experts")
    return Experts(
        num_experts=num_experts,
        experts_per_token=config.count("num_experts_per_tok", 2, maximum=num_experts),
        intermediate_size=config.count("moe_intermediate_size", 7688),
        shared_intermediate_size=config.count("moe_shared_expert_intermediate_size", 7688),
    )


def _nemotron_moe(
    name: str, hidden: int, mixture: Experts, *, latent: int | None, bias: bool
) -> Tensors:
    """Experts without a gate; with `latent` they work in a narrower space than the layer."""
    space = latent or hidden
    num_experts, width = mixture.num_experts, mixture.intermediate_size
    per_token, shared = mixture.experts_per_token, mixture.shared_intermediate_size
    down, up = f"{name}.fc1_latent_proj", f"{name}.fc2_latent_proj"
    return (
        *experts(f"{name}.experts.up_proj", num_experts, width, space, per_token=per_token),
        *experts(f"{name}.experts.down_proj", num_experts, space, width, per_token=per_token),
        *router(f"{name}.gate", mixture, hidden),
        *_nemotron_mlp(f"{name}.shared_experts", hidden, shared, bias=bias),
        *(linear(down, space, hidden, bias=bias) if latent else ()),
        *(linear(up, hidden, space, bias=bias) if latent else ()),
    )


def _nemotron_mlp(name: str, hidden: int, width: int, *, bias: bool) -> Tensors:
    return plain_mlp(f"{name}.up_proj", f"{name}.down_proj", hidden, width, bias=bias)
