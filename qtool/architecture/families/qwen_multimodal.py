"""Qwen3-VL, and Qwen3.5 with its linear attention layers; both with the same vision tower."""

from __future__ import annotations

from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    PLAIN_NAMES,
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
    layer_types,
    norms,
    read_sizes,
    whole_context,
)
from qtool.architecture.families.vision import qwen_vision, with_vision
from qtool.architecture.parts import Tensors, convolution, linear, norm, parameter
from qtool.architecture.stored_names import StoredNames

_MTP = (r"^mtp\.", "the multi-token prediction layer, which transformers leaves out")
_DEEPSTACK_DEFAULT = (8, 16, 24)


def qwen3_vl(config: Config) -> Body:
    """qwen3_vl: qwen3 without sliding windows behind the vision tower."""
    text_config, vision_config = config.section("text_config"), config.section("vision_config")
    sizes = read_sizes(
        text_config,
        hidden=4096,
        intermediate=22016,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocab=151936,
        context=128000,
    )
    bias = text_config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *head_norms(f"{name}.self_attn", sizes),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(text_config, sizes)
    layers = [layer] * sizes.num_layers
    text = decoder(text_config, sizes, layers, cache, root="model.language_model")
    deepstack = vision_config.items("deepstack_visual_indexes")
    tower = qwen_vision(
        vision_config,
        "model.visual",
        deepstack=len(_DEEPSTACK_DEFAULT if deepstack is None else deepstack),
    )
    return with_vision(config, text, tower.tensors, tied=False, stored_names=PLAIN_NAMES)


def qwen3_5(config: Config) -> Body:
    """qwen3_5: the hybrid decoder behind the vision tower."""
    text = _hybrid(config.section("text_config"), "model.language_model")
    tower = qwen_vision(config.section("vision_config"), "model.visual", deepstack=0)
    names = StoredNames("model", ignored=(ROTARY_BUFFER, _MTP))
    return with_vision(config, text, tower.tensors, tied=False, stored_names=names)


def qwen3_5_text(config: Config) -> Body:
    """qwen3_5_text: the hybrid decoder alone; it also loads from the multimodal checkpoint."""
    return _hybrid(config, "model")


_TEXT_NAMES = StoredNames(
    "model",
    renames=((r"^model\.language_model\.", "model."),),
    ignored=(ROTARY_BUFFER, _MTP, (r"^model\.visual\.", "the vision tower, not in this class")),
)


def _hybrid(config: Config, root: str) -> Body:
    """Three layers of gated delta rule (linear attention), then one of gated full attention."""
    sizes = read_sizes(
        config,
        hidden=4096,
        intermediate=12288,
        layers=32,
        heads=16,
        kv_heads=4,
        head_dim=256,
        vocab=248320,
        context=32768,
    )
    period = config.count("full_attention_interval", 4)
    kinds = layer_types(
        config,
        sizes.num_layers,
        lambda index: "linear_attention" if (index + 1) % period else "full_attention",
        ("linear_attention", "full_attention"),
    )
    mixers = {
        "linear_attention": _delta_rule(config, sizes),
        "full_attention": _gated_attention(config, sizes),
    }

    def layer_of(kind: str) -> Layer:
        def layer(name: str) -> Tensors:
            return (
                *mixers[kind](name),
                *gated_mlp(f"{name}.mlp", sizes),
                *norms(name, sizes.hidden, *PRE_NORMS),
            )

        return layer

    return decoder(
        config,
        sizes,
        [layer_of(kind) for kind in kinds],
        whole_context(sizes)[: kinds.count("full_attention")],
        root=root,
        stored_names=_TEXT_NAMES,
        unmodelled=("recurrent state of the linear attention layers",),
    )


def _gated_attention(config: Config, sizes: Sizes) -> Layer:
    bias = config.flag("attention_bias", False)

    def mixer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            # Twice as wide: the second half of each head gates its output.
            *linear(f"{own}.q_proj", 2 * sizes.query_width, sizes.hidden, bias=bias),
            *linear(f"{own}.k_proj", sizes.kv_width, sizes.hidden, bias=bias),
            *linear(f"{own}.v_proj", sizes.kv_width, sizes.hidden, bias=bias),
            *linear(f"{own}.o_proj", sizes.hidden, sizes.query_width, bias=bias),
            *head_norms(own, sizes),
        )

    return mixer


def _delta_rule(config: Config, sizes: Sizes) -> Layer:
    value_heads = config.count("linear_num_value_heads", 32)
    value_head_dim = config.count("linear_value_head_dim", 128)
    keys = config.count("linear_num_key_heads", 16) * config.count("linear_key_head_dim", 128)
    values = value_heads * value_head_dim
    kernel = config.count("linear_conv_kernel_dim", 4)

    def mixer(name: str) -> Tensors:
        own, hidden = f"{name}.linear_attn", sizes.hidden
        return (
            *parameter(f"{own}.dt_bias", value_heads),
            *parameter(f"{own}.A_log", value_heads),
            *convolution(f"{own}.conv1d", 2 * keys + values, 1, kernel, bias=False),
            *norm(f"{own}.norm", value_head_dim),
            *linear(f"{own}.out_proj", hidden, values),
            *linear(f"{own}.in_proj_qkv", 2 * keys + values, hidden),
            *linear(f"{own}.in_proj_z", values, hidden),
            *linear(f"{own}.in_proj_b", value_heads, hidden),
            *linear(f"{own}.in_proj_a", value_heads, hidden),
        )

    return mixer
