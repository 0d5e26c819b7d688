"""Qwen's text decoders behind their vision towers: Qwen2-VL to Qwen3.5, dense and mixtures."""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PRE_NORMS,
    ROTARY_BUFFER,
    Body,
    attention,
    attention_cache,
    decoder,
    gated_mlp,
    head_norms,
    norms,
    read_experts,
    read_sizes,
    whole_context,
)
from qtool.architecture.families.linear_attention import qwen3_5_moe_text, qwen3_5_text
from qtool.architecture.families.moe import EXPERT_NAMES, qwen3_layers
from qtool.architecture.families.vision import (
    Tower,
    qwen2_5_vision,
    qwen2_vision,
    qwen_vision,
    with_vision,
)
from qtool.architecture.parts import Tensors
from qtool.architecture.stored_names import StoredNames

_ROOT = "model.language_model"
_DEEPSTACK_DEFAULT = (8, 16, 24)


def qwen2_vl(config: Config) -> Body:
    """qwen2_vl: qwen2 behind a tower of plain MLPs."""
    return _qwen2(config, qwen2_vision(config.section("vision_config"), "model.visual"))


def qwen2_5_vl(config: Config) -> Body:
    """qwen2_5_vl: qwen2 behind a tower of gated MLPs."""
    return _qwen2(config, qwen2_5_vision(config.section("vision_config"), "model.visual"))


def _qwen2(config: Config, tower: Tower) -> Body:
    """The text decoder; older configs have its values next to the vision tower's section."""
    text = config.optional_section("text_config") or config
    sizes = read_sizes(
        text,
        hidden=8192,
        intermediate=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=152064,
        context=32768,
    )
    first_sliding = text.whole("max_window_layers", 80)
    cache = attention_cache(
        text,
        sizes,
        window=4096,
        enabled=text.flag("use_sliding_window", False),
        sliding=lambda index: index >= first_sliding,
    )

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=True),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    body = decoder(text, sizes, [layer] * sizes.num_layers, cache, root=_ROOT)
    whole = with_vision(config, body, tower.tensors, tied=False, stored_names=_QWEN2_NAMES)
    return replace(whole, tied=whole.tied or body.tied)  # either section may tie the head


_QWEN2_NAMES = StoredNames(
    "model",
    renames=(
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ),
    ignored=(ROTARY_BUFFER,),
)


def qwen3_vl(config: Config) -> Body:
    """qwen3_vl: qwen3 without sliding windows."""
    text = config.section("text_config")
    sizes = read_sizes(
        text,
        hidden=4096,
        intermediate=22016,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocab=151936,
        context=128000,
    )
    bias = text.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *head_norms(f"{name}.self_attn", sizes),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(text, sizes)
    body = decoder(text, sizes, [layer] * sizes.num_layers, cache, root=_ROOT)
    return _with_tower(config, body, deepstack=_deepstack(config))


def qwen3_vl_moe(config: Config) -> Body:
    """qwen3_vl_moe: qwen3_moe without sliding windows. Its checkpoints store the experts
    transposed, the model holds them as every other mixture does."""
    text = config.section("text_config")
    sizes = read_sizes(
        text,
        hidden=2048,
        intermediate=5632,
        layers=24,
        heads=16,
        kv_heads=16,
        vocab=151936,
        context=128000,
    )
    mixture = read_experts(text, "num_experts", 60, per_token=4, width=1408)
    layers, cache = qwen3_layers(text, sizes, mixture), whole_context(sizes)
    body = decoder(text, sizes, layers, cache, root=_ROOT, experts=mixture)
    return _with_tower(config, body, deepstack=_deepstack(config))


def qwen3_5(config: Config) -> Body:
    """qwen3_5: the dense hybrid."""
    return _with_tower(config, qwen3_5_text(config.section("text_config"), _ROOT), deepstack=0)


def qwen3_5_moe(config: Config) -> Body:
    """qwen3_5_moe: the hybrid with mixtures."""
    return _with_tower(config, qwen3_5_moe_text(config.section("text_config"), _ROOT), deepstack=0)


def _with_tower(config: Config, text: Body, *, deepstack: int) -> Body:
    tower = qwen_vision(config.section("vision_config"), "model.visual", deepstack=deepstack)
    return with_vision(config, text, tower.tensors, tied=False, stored_names=EXPERT_NAMES)


def _deepstack(config: Config) -> int:
    """How many inner layers the tower also feeds."""
    given = config.section("vision_config").items("deepstack_visual_indexes")
    return len(_DEEPSTACK_DEFAULT if given is None else given)
