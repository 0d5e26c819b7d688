"""Gemma 1 to 3: a head width of its own, tied embeddings, from Gemma 2 on four norms per layer."""

from __future__ import annotations

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
    norms,
    read_sizes,
)
from qtool.architecture.families.vision import siglip, with_vision
from qtool.architecture.parts import Tensors, norm, parameter
from qtool.architecture.stored_names import StoredNames

FOUR_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def gemma(config: Config) -> Body:
    """gemma (Gemma 1, CodeGemma)."""
    sizes = read_sizes(
        config,
        hidden=3072,
        intermediate=24576,
        layers=28,
        heads=16,
        kv_heads=16,
        head_dim=256,
        vocab=256000,
        context=8192,
        activation="gelu_pytorch_tanh",
    )
    cache = attention_cache(config, sizes)
    layer = _layer(config, sizes, PRE_NORMS)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, tied=True)


def gemma2(config: Config) -> Body:
    """gemma2: every other layer slides."""
    sizes = _sizes(config, vocab=256000, context=8192)
    cache = attention_cache(
        config,
        sizes,
        window=4096,
        sliding=lambda index: index % 2 == 0,
    )
    layer = _layer(config, sizes, FOUR_NORMS)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, tied=True)


def gemma3_text(config: Config, root: str = "model") -> Body:
    """gemma3_text: five of six layers slide, queries and keys are normed per head."""
    sizes = _sizes(config, vocab=262208, context=131072)
    period = config.count("sliding_window_pattern", 6)
    cache = attention_cache(
        config,
        sizes,
        window=4096,
        sliding=lambda index: (index + 1) % period != 0,
    )
    layer = _layer(config, sizes, FOUR_NORMS, qk_norm=True)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, tied=True, root=root)


def gemma3(config: Config) -> Body:
    """gemma3: gemma3_text behind a SigLIP vision tower and a projection."""
    text = gemma3_text(config.section("text_config"), root="model.language_model")
    tower = siglip(config.section("vision_config"), "model.vision_tower")
    projector = "model.multi_modal_projector"
    vision = (
        *tower.tensors,
        *parameter(f"{projector}.mm_input_projection_weight", tower.width, text.sizes.hidden),
        *norm(f"{projector}.mm_soft_emb_norm", tower.width),
    )
    return with_vision(config, text, vision, tied=True, stored_names=_GEMMA3_NAMES)


# Checkpoints of transformers before 4.52 put the language model outermost; SigLIP lost a level.
_GEMMA3_NAMES = StoredNames(
    "model",
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(language_model|vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.language_model\.model\.", "model.language_model."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    ),
    ignored=(ROTARY_BUFFER, (r"position_ids$", "position numbers, which the model computes")),
)


def _sizes(config: Config, *, vocab: int, context: int) -> Sizes:
    sizes = read_sizes(
        config,
        hidden=2304,
        intermediate=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        vocab=vocab,
        context=context,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
    )
    config.require_divisible("hidden_size", sizes.hidden, sizes.num_heads, "num_attention_heads")
    return sizes


def _layer(
    config: Config, sizes: Sizes, norm_names: tuple[str, ...], *, qk_norm: bool = False
) -> Layer:
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *(head_norms(f"{name}.self_attn", sizes) if qk_norm else ()),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *norm_names),
        )

    return layer
