"""Llama 4: mixtures with a shared expert, attention in chunks, its own vision tower."""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.cache import AttentionCache, CacheLayer
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PLAIN_NAMES,
    PRE_NORMS,
    Body,
    Layer,
    Sizes,
    attention,
    decoder,
    gated_mlp,
    layer_indices,
    layer_types,
    norms,
    plain_mlp,
    read_experts,
    read_sizes,
    routed_experts,
    stack,
)
from qtool.architecture.families.vision import Tower, with_vision
from qtool.architecture.parts import Tensors, linear, parameter
from qtool.architecture.records import Experts

_TEXT_NAMES = replace(PLAIN_NAMES, prefix="language_model")


def llama4_text(config: Config, root: str = "model") -> Body:
    """llama4_text: the text decoder, whose experts are stored transposed."""
    sizes = read_sizes(
        config,
        hidden=5120,
        intermediate=8192,
        layers=48,
        heads=40,
        kv_heads=8,
        head_dim=128,
        vocab=202048,
        context=131072,
    )
    mixture = read_experts(
        config,
        "num_local_experts",
        16,
        per_token=1,
        width=sizes.intermediate,
        width_key="intermediate_size",
        shared_width=sizes.intermediate,
    )
    sizes = replace(sizes, intermediate=config.count("intermediate_size_mlp", 16384))
    sparse = _sparse_layers(config, sizes.num_layers)
    return decoder(
        config,
        sizes,
        [_layer(config, sizes, mixture if i in sparse else None) for i in range(sizes.num_layers)],
        _cache(config, sizes),
        root=root,
        stored_names=_TEXT_NAMES,
        experts=mixture,
    )


def llama4(config: Config) -> Body:
    """llama4 (Scout, Maverick): llama4_text behind the vision tower."""
    text = llama4_text(config.section("text_config"), "language_model.model")
    tower = _vision(config.section("vision_config"), "vision_model")
    projection = linear("multi_modal_projector.linear_1", text.sizes.hidden, tower.width)
    vision = (*tower.tensors, *projection)
    body = with_vision(config, text, vision, tied=False, stored_names=PLAIN_NAMES)
    return replace(body, head="language_model.lm_head")


def _sparse_layers(config: Config, num_layers: int) -> frozenset[int]:
    """The layers with experts: every `interleave_moe_layer_step`-th, unless the config says."""
    step = config.count("interleave_moe_layer_step", 1)
    given = layer_indices(config, "moe_layers")
    return frozenset(range(step - 1, num_layers, step)) if given is None else given


def _cache(config: Config, sizes: Sizes) -> tuple[CacheLayer, ...]:
    """Layers with rotary positions, three of four, attend within chunks."""
    rotary = config.items("no_rope_layers")
    if rotary and len(rotary) != sizes.num_layers:
        config.reject("no_rope_layers", rotary, f"{sizes.num_layers} entries")
    period = config.count("no_rope_layer_interval", 4)
    kinds = layer_types(
        config,
        sizes.num_layers,
        lambda i: (
            "chunked_attention" if (rotary[i] if rotary else (i + 1) % period) else "full_attention"
        ),
        ("chunked_attention", "full_attention"),
    )
    full = AttentionCache(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
    chunk = config.optional_count("attention_chunk_size", 8192)
    chunked = replace(full, window=chunk, chunked=chunk is not None)
    return tuple(chunked if kind == "chunked_attention" else full for kind in kinds)


def _layer(config: Config, sizes: Sizes, mixture: Experts | None) -> Layer:
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        mlp = f"{name}.feed_forward"
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *(_experts(mlp, sizes, mixture) if mixture else gated_mlp(mlp, sizes)),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    return layer


def _experts(name: str, sizes: Sizes, mixture: Experts) -> Tensors:
    """The router is a subclass of nn.Linear, which bitsandbytes leaves alone."""
    shared_width = mixture.shared_intermediate_size
    return (
        *routed_experts(f"{name}.experts", mixture, sizes.hidden, transposed=True),
        *linear(f"{name}.router", mixture.num_experts, sizes.hidden, replaceable=False),
        *gated_mlp(f"{name}.shared_expert", sizes, width=shared_width),
    )


def _vision(config: Config, root: str) -> Tower:
    width, mlp = config.count("hidden_size", 768), config.count("intermediate_size", 5632)
    patch = config.count("patch_size", 14)
    patches = (config.count("image_size", 448) // patch) ** 2
    projected = config.count("projector_output_dim", 4096)
    adapter = f"{root}.vision_adapter.mlp"

    def layer(name: str) -> Tensors:
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        return (
            *(
                tensor
                for projection in projections
                for tensor in linear(f"{name}.self_attn.{projection}", width, width, bias=True)
            ),
            *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", width, mlp),
            *norms(name, width, *PRE_NORMS, bias=True),
        )

    tensors = (
        *parameter(f"{root}.class_embedding", width),
        *parameter(f"{root}.positional_embedding_vlm", patches + 1, width),
        *linear(
            f"{root}.patch_embedding.linear", width, config.count("num_channels", 3) * patch**2
        ),
        *norms(root, width, "layernorm_pre", "layernorm_post", bias=True),
        *stack(f"{root}.model.layers", [layer] * config.num_layers("num_hidden_layers", 34)),
        *linear(f"{adapter}.fc1", config.count("projector_input_dim", 4096), mlp),
        *linear(f"{adapter}.fc2", projected, projected),
    )
    return Tower(tensors, config.count("vision_output_dim", 7680))
