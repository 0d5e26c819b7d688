"""Gemma 4: wide heads in the full-attention layers, layers that share the caches of earlier ones,
embeddings per layer, and in some models a mixture of experts beside the MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.architecture.cache import AttentionCache, CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    ROTARY_BUFFER,
    Body,
    Layer,
    Sizes,
    decoder,
    gated_mlp,
    layer_types,
    norms,
    read_experts,
    read_sizes,
    routed_experts,
    stack,
)
from qtool.architecture.families.gemma import FOUR_NORMS
from qtool.architecture.families.vision import Tower
from qtool.architecture.parts import Tensors, convolution, embedding, linear, norm, parameter
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import StoredNames

_FULL, _SLIDING = "full_attention", "sliding_attention"
_BUFFERS = (
    r"\.(?:layer_scalar|std_bias|std_scale|(?:in|out)put_(?:min|max))$",
    "a scale or a limit, a buffer of the model",
)


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """One layer's attention: sliding or full, its heads, whether it uses another's cache."""

    kind: str
    num_kv_heads: int
    head_dim: int
    shares_cache: bool


def gemma4_text(config: Config, root: str = "model") -> Body:
    """gemma4_text: the text decoder, dense or with mixtures."""
    sizes = read_sizes(
        config,
        hidden=2304,
        intermediate=9216,
        layers=30,
        heads=8,
        kv_heads=4,
        head_dim=256,
        vocab=262144,
        context=131072,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
    )
    layers = _layer_kinds(config, sizes)
    per_layer = config.whole("hidden_size_per_layer_input", 256)
    mixture = _mixture(config)
    return decoder(
        config,
        sizes,
        [_layer(config, sizes, layer, per_layer, mixture) for layer in layers],
        _cache(config, layers),
        root=root,
        final_norm=(
            *norm(f"{root}.norm", sizes.hidden),
            *(_per_layer_inputs(config, root, sizes, per_layer) if per_layer else ()),
        ),
        tied=True,
        stored_names=_stored_names(layers),
        experts=mixture,
    )


def gemma4(config: Config) -> Body:
    """gemma4: gemma4_text behind a vision tower and an audio tower, where their configs are."""
    text = gemma4_text(config.section("text_config"), "model.language_model")
    vision_config = config.optional_section("vision_config")
    audio_config = config.optional_section("audio_config")
    none = Tower((), 0)
    vision = _vision(vision_config, "model.vision_tower") if vision_config else none
    audio = _audio(audio_config, "model.audio_tower") if audio_config else none
    projections = [
        linear(f"model.{name}.embedding_projection", text.sizes.hidden, tower.width)
        for name, tower in (("embed_vision", vision), ("embed_audio", audio))
        if tower.tensors
    ]
    return replace(
        text,
        tensors=(*vision.tensors, *text.tensors, *audio.tensors, *sum(projections, ())),
        tied=config.flag("tie_word_embeddings", True),
        unmodelled=(
            *(("vision tower activations", "image tokens") if vision.tensors else ()),
            *(("audio tower activations", "audio tokens") if audio.tensors else ()),
        ),
    )


def _layer_kinds(config: Config, sizes: Sizes) -> list[_LayerKind]:
    """Five of six layers slide, the last one never; the last `num_kv_shared_layers` share."""
    kinds = layer_types(
        config, sizes.num_layers, lambda i: _SLIDING if (i + 1) % 6 else _FULL, (_FULL, _SLIDING)
    )
    kinds[-1] = _FULL
    num_shared = config.whole("num_kv_shared_layers", 0)
    num_own = sizes.num_layers - num_shared
    if num_own <= 0 or set(kinds[:num_own]) != set(kinds):
        expected = "a number that leaves a layer of each kind with a cache of its own"
        config.reject("num_kv_shared_layers", num_shared, expected)
    heads = _heads(config, sizes, kinds)
    return [
        _LayerKind(kind, *heads[index], shares_cache=index >= num_own)
        for index, kind in enumerate(kinds)
    ]


def _heads(config: Config, sizes: Sizes, kinds: list[str]) -> list[tuple[int, int]]:
    """Key-value heads and head width of every layer. transformers saves what differs from the
    config's own values per layer; before, configs had the values of the full layers."""
    saved = config.optional_section("per_layer_config")
    if saved is not None:
        each = [saved.section(str(index)) for index in range(sizes.num_layers)]
        return [
            (
                layer.count("num_key_value_heads", sizes.num_kv_heads),
                layer.count("head_dim", sizes.head_dim),
            )
            for layer in each
        ]
    full_kv_heads = sizes.num_kv_heads
    if config.flag("attention_k_eq_v", False):
        full_kv_heads = config.optional_count("num_global_key_value_heads") or full_kv_heads
    full = (full_kv_heads, config.count("global_head_dim", 512))
    return [full if kind == _FULL else (sizes.num_kv_heads, sizes.head_dim) for kind in kinds]


def _mixture(config: Config) -> Experts | None:
    if not config.flag("enable_moe_block", False):
        return None
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if config.optional_count(key) is None:
            config.reject(key, None, "a whole number, as enable_moe_block is true")
    return read_experts(
        config, "num_experts", 1, per_token=1, per_token_key="top_k_experts", width=1
    )


def _cache(config: Config, layers: list[_LayerKind]) -> tuple[CacheLayer, ...]:
    window = config.count("sliding_window", 512)
    if config.text("use_bidirectional_attention") == "all":
        window = window // 2 + 1
    return tuple(
        AttentionCache(
            layer.num_kv_heads,
            layer.head_dim,
            layer.head_dim,
            window if layer.kind == _SLIDING else None,
        )
        for layer in layers
        if not layer.shares_cache
    )


def _layer(
    config: Config, sizes: Sizes, own: _LayerKind, per_layer: int, mixture: Experts | None
) -> Layer:
    bias = config.flag("attention_bias", False)
    has_values = own.kind == _SLIDING or not config.flag("attention_k_eq_v", False)
    double = own.shares_cache and config.flag("use_double_wide_mlp", False)
    mlp_width, hidden = sizes.intermediate * (2 if double else 1), sizes.hidden

    def layer(name: str) -> Tensors:
        return (
            *_attention(f"{name}.self_attn", sizes, own, bias=bias, has_values=has_values),
            *gated_mlp(f"{name}.mlp", sizes, width=mlp_width),
            *norms(name, hidden, *FOUR_NORMS),
            *(_per_layer_gate(name, hidden, per_layer) if per_layer else ()),
            *(_experts(name, hidden, mixture) if mixture else ()),
        )

    return layer


def _attention(
    name: str, sizes: Sizes, own: _LayerKind, *, bias: bool, has_values: bool
) -> Tensors:
    queries, keys = sizes.num_heads * own.head_dim, own.num_kv_heads * own.head_dim
    keys_and_values = (
        *norm(f"{name}.k_norm", own.head_dim),
        *linear(f"{name}.k_proj", keys, sizes.hidden, bias=bias),
        *(linear(f"{name}.v_proj", keys, sizes.hidden, bias=bias) if has_values else ()),
    )
    return (
        *linear(f"{name}.q_proj", queries, sizes.hidden, bias=bias),
        *norm(f"{name}.q_norm", own.head_dim),
        *(() if own.shares_cache else keys_and_values),
        *linear(f"{name}.o_proj", sizes.hidden, queries, bias=bias),
    )


def _per_layer_gate(name: str, hidden: int, width: int) -> Tensors:
    return (
        *linear(f"{name}.per_layer_input_gate", width, hidden),
        *linear(f"{name}.per_layer_projection", hidden, width),
        *norm(f"{name}.post_per_layer_input_norm", hidden),
    )


def _per_layer_inputs(config: Config, root: str, sizes: Sizes, width: int) -> Tensors:
    """The second embedding: one row holds what a token adds to every layer."""
    rows, all_layers = (
        config.count("vocab_size_per_layer_input", 262144),
        sizes.num_layers * width,
    )
    return (
        *embedding(f"{root}.embed_tokens_per_layer", rows, all_layers),
        *linear(f"{root}.per_layer_model_projection", all_layers, sizes.hidden),
        *norm(f"{root}.per_layer_projection_norm", width),
    )


def _experts(name: str, hidden: int, mixture: Experts) -> Tensors:
    """Beside the MLP; its router is an ordinary linear layer with scales."""
    return (
        *parameter(f"{name}.router.scale", hidden),
        *parameter(f"{name}.router.per_expert_scale", mixture.num_experts),
        *linear(f"{name}.router.proj", mixture.num_experts, hidden),
        *routed_experts(f"{name}.experts", mixture, hidden),
        *norms(
            name,
            hidden,
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ),
    )


def _stored_names(layers: list[_LayerKind]) -> StoredNames:
    """Checkpoints hold keys and values for the layers that share a cache, too."""
    sharing = "|".join(str(index) for index, layer in enumerate(layers) if layer.shares_cache)
    unused = (
        rf"layers\.(?:{sharing})\.self_attn\.(?:k_proj|v_proj|k_norm)\.",
        "of a layer that uses another's keys and values",
    )
    return StoredNames("model", ignored=(ROTARY_BUFFER, _BUFFERS, *((unused,) if sharing else ())))


def _vision(config: Config, root: str) -> Tower:
    width, mlp = config.count("hidden_size", 768), config.count("intermediate_size", 3072)
    heads, kv_heads = (
        config.count("num_attention_heads", 12),
        config.count("num_key_value_heads", 12),
    )
    head_dim, patch = config.count("head_dim", 64), config.count("patch_size", 16)
    positions = config.count("position_embedding_size", 10240)

    def layer(name: str) -> Tensors:
        own, mlp_name = f"{name}.self_attn", f"{name}.mlp"
        return (
            *linear(f"{own}.q_proj.linear", heads * head_dim, width),
            *linear(f"{own}.k_proj.linear", kv_heads * head_dim, width),
            *linear(f"{own}.v_proj.linear", kv_heads * head_dim, width),
            *linear(f"{own}.o_proj.linear", width, heads * head_dim),
            *norms(own, head_dim, "q_norm", "k_norm"),
            *linear(f"{mlp_name}.gate_proj.linear", mlp, width),
            *linear(f"{mlp_name}.up_proj.linear", mlp, width),
            *linear(f"{mlp_name}.down_proj.linear", width, mlp),
            *norms(name, width, *FOUR_NORMS),
        )

    tensors = (
        *parameter(f"{root}.patch_embedder.position_embedding_table", 2, positions, width),
        *linear(f"{root}.patch_embedder.input_proj", width, 3 * patch * patch),
        *stack(f"{root}.encoder.layers", [layer] * config.num_layers("num_hidden_layers", 16)),
    )
    return Tower(tensors, width)


def _audio(config: Config, root: str) -> Tower:
    width = config.count("hidden_size", 1024)
    heads, kernel = config.count("num_attention_heads", 8), config.count("conv_kernel_size", 5)
    head_dim = config.require_divisible("hidden_size", width, heads, "num_attention_heads")
    out = config.count("output_proj_dims", 1536)

    def layer(name: str) -> Tensors:
        own, light = f"{name}.self_attn", f"{name}.lconv1d"
        return (
            *_audio_mlp(f"{name}.feed_forward1", width),
            *_audio_mlp(f"{name}.feed_forward2", width),
            *parameter(f"{own}.per_dim_scale", head_dim),
            *linear(f"{own}.q_proj.linear", heads * head_dim, width),
            *linear(f"{own}.k_proj.linear", heads * head_dim, width),
            *linear(f"{own}.v_proj.linear", heads * head_dim, width),
            *linear(f"{own}.post.linear", width, width),
            *linear(f"{own}.relative_k_proj", heads * head_dim, width),
            *linear(f"{light}.linear_start.linear", 2 * width, width),
            *linear(f"{light}.linear_end.linear", width, width),
            *convolution(f"{light}.depthwise_conv1d", width, 1, kernel, bias=False),
            *norms(light, width, "pre_layer_norm", "conv_norm"),
            *norms(name, width, "norm_pre_attn", "norm_post_attn", "norm_out"),
        )

    tensors = (
        *_subsampling(config, f"{root}.subsample_conv_projection", width),
        *stack(f"{root}.layers", [layer] * config.num_layers("num_hidden_layers", 12)),
        *linear(f"{root}.output_proj", out, width, bias=True),
    )
    return Tower(tensors, out)


def _audio_mlp(name: str, width: int) -> Tensors:
    return (
        *linear(f"{name}.ffw_layer_1.linear", 4 * width, width),
        *linear(f"{name}.ffw_layer_2.linear", width, 4 * width),
        *norms(name, width, "pre_layer_norm", "post_layer_norm"),
    )


def _subsampling(config: Config, name: str, width: int) -> Tensors:
    channels = config.items("subsampling_conv_channels") or (128, 32)
    if len(channels) != 2 or not all(type(number) is int and number > 0 for number in channels):
        config.reject("subsampling_conv_channels", channels, "two whole numbers from 1 on")
    first, second = channels
    return (
        *convolution(f"{name}.layer0.conv", first, 1, 3, 3, bias=False),
        *norm(f"{name}.layer0.norm", first),
        *convolution(f"{name}.layer1.conv", second, first, 3, 3, bias=False),
        *norm(f"{name}.layer1.norm", second),
        *linear(f"{name}.input_proj_linear", width, first // 4 * second),
    )
