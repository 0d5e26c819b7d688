"""Vision towers, and putting one in front of a text decoder.

Only their parameters are described: what an image costs in activations and tokens depends on the
image, so `unmodelled` names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.architecture.config import Config
from qtool.architecture.decoder import Body, Layer, norms, plain_mlp, stack
from qtool.architecture.parts import Tensors, convolution, embedding, linear, norm, parameter
from qtool.architecture.records import ModelTensor
from qtool.architecture.stored_names import StoredNames
from qtool.errors import QtoolError


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower's parameters and the width of what it puts out."""

    tensors: Tensors
    width: int


def with_vision(
    config: Config, text: Body, vision: Tensors, *, tied: bool, stored_names: StoredNames
) -> Body:
    """`text` with a vision tower before it; `tied` is the default of the whole model's config."""
    return replace(
        text,
        tensors=(*vision, *text.tensors),
        tied=config.flag("tie_word_embeddings", tied),
        stored_names=stored_names,
        unmodelled=(*text.unmodelled, "vision tower activations", "image tokens"),
    )


def siglip(config: Config, root: str) -> Tower:
    """siglip_vision_model."""
    kind = config.text("model_type")
    if kind not in (None, "siglip_vision_model"):
        raise QtoolError(
            f"config.json: vision_config.model_type {kind[:80]!r} is not supported; known: "
            "siglip_vision_model",
            kind="unsupported",
            hint="use a checkpoint with that vision tower",
        )
    width, mlp = config.count("hidden_size", 768), config.count("intermediate_size", 3072)
    patch = config.count("patch_size", 16)
    side = config.count("image_size", 224) // patch
    channels = config.count("num_channels", 3)
    with_head = config.flag("vision_use_head", True)

    def layer(name: str) -> Tensors:
        projections = ("k_proj", "v_proj", "q_proj", "out_proj")
        return (
            *norms(name, width, "layer_norm1", bias=True),
            *(
                tensor
                for projection in projections
                for tensor in linear(f"{name}.self_attn.{projection}", width, width, bias=True)
            ),
            *norms(name, width, "layer_norm2", bias=True),
            *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", width, mlp),
        )

    layers = [layer] * config.num_layers("num_hidden_layers", 12)
    tensors = (
        *convolution(f"{root}.embeddings.patch_embedding", width, channels, patch, patch),
        *embedding(f"{root}.embeddings.position_embedding", side * side, width),
        *stack(f"{root}.encoder.layers", layers),
        *norm(f"{root}.post_layernorm", width, bias=True),
        *(_attention_pooling(f"{root}.head", width, mlp) if with_head else ()),
    )
    return Tower(tensors, width)


def _attention_pooling(name: str, width: int, mlp: int) -> Tensors:
    """SigLIP's pooling head: torch's own MultiheadAttention, whose output projection is a
    subclass of nn.Linear."""
    attention = f"{name}.attention"
    return (
        *parameter(f"{name}.probe", 1, 1, width),
        *parameter(f"{attention}.in_proj_weight", 3 * width, width),
        ModelTensor(f"{attention}.in_proj_bias", (3 * width,), "bias"),
        *linear(f"{attention}.out_proj", width, width, bias=True, replaceable=False),
        *norm(f"{name}.layernorm", width, bias=True),
        *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", width, mlp),
    )


def qwen2_vision(config: Config, root: str) -> Tower:
    """The tower of Qwen2-VL, whose `hidden_size` is the width it puts out."""
    width, out = config.count("embed_dim", 1280), config.count("hidden_size", 3584)
    mlp = width * config.count("mlp_ratio", 4)

    def block(name: str) -> Tensors:
        return (
            *norms(name, width, "norm1", "norm2", bias=True),
            *linear(f"{name}.attn.qkv", 3 * width, width, bias=True),
            *linear(f"{name}.attn.proj", width, width, bias=True),
            *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", width, mlp),
        )

    return _qwen2_tower(config, root, block, width, out, norm_bias=True)


def qwen2_5_vision(config: Config, root: str) -> Tower:
    """The tower of Qwen2.5-VL: gated MLPs, norms without biases."""
    width, out = config.count("hidden_size", 3584), config.count("out_hidden_size", 3584)
    mlp = config.count("intermediate_size", 3420)

    def block(name: str) -> Tensors:
        return (
            *norms(name, width, "norm1", "norm2"),
            *linear(f"{name}.attn.qkv", 3 * width, width, bias=True),
            *linear(f"{name}.attn.proj", width, width, bias=True),
            *linear(f"{name}.mlp.gate_proj", mlp, width, bias=True),
            *linear(f"{name}.mlp.up_proj", mlp, width, bias=True),
            *linear(f"{name}.mlp.down_proj", width, mlp, bias=True),
        )

    return _qwen2_tower(config, root, block, width, out, norm_bias=False)


def _qwen2_tower(
    config: Config, root: str, block: Layer, width: int, out: int, *, norm_bias: bool
) -> Tower:
    patch, merge = config.count("patch_size", 14), config.count("spatial_merge_size", 2)
    kernel = (config.count("temporal_patch_size", 2), patch, patch)
    channels, merged = config.count("in_channels", 3), width * merge * merge
    layers = [block] * config.num_layers("depth", 32, alias="num_hidden_layers")
    tensors = (
        *convolution(f"{root}.patch_embed.proj", width, channels, *kernel, bias=False),
        *stack(f"{root}.blocks", layers),
        *norm(f"{root}.merger.ln_q", width, bias=norm_bias),
        *linear(f"{root}.merger.mlp.0", merged, merged, bias=True),
        *linear(f"{root}.merger.mlp.2", out, merged, bias=True),
    )
    return Tower(tensors, out)


def qwen_vision(config: Config, root: str, *, deepstack: int) -> Tower:
    """The tower of Qwen3-VL and Qwen3.5; `deepstack` counts the mergers that feed inner layers."""
    width, mlp = config.count("hidden_size", 1152), config.count("intermediate_size", 4304)
    merge = config.count("spatial_merge_size", 2)
    merged, out = width * merge * merge, config.count("out_hidden_size", 3584)
    patch = config.count("patch_size", 16)
    kernel = (config.count("temporal_patch_size", 2), patch, patch)
    positions = config.count("num_position_embeddings", 2304)

    def block(name: str) -> Tensors:
        return (
            *norms(name, width, "norm1", "norm2", bias=True),
            *linear(f"{name}.attn.qkv", 3 * width, width, bias=True),
            *linear(f"{name}.attn.proj", width, width, bias=True),
            *plain_mlp(f"{name}.mlp.linear_fc1", f"{name}.mlp.linear_fc2", width, mlp),
        )

    def merger(name: str, norm_width: int) -> Tensors:
        return (
            *norm(f"{name}.norm", norm_width, bias=True),
            *linear(f"{name}.linear_fc1", merged, merged, bias=True),
            *linear(f"{name}.linear_fc2", out, merged, bias=True),
        )

    layers = [block] * config.num_layers("depth", 27, alias="num_hidden_layers")
    mergers = [lambda name: merger(name, merged)] * deepstack
    tensors = (
        *convolution(f"{root}.patch_embed.proj", width, config.count("in_channels", 3), *kernel),
        *embedding(f"{root}.pos_embed", positions, width),
        *stack(f"{root}.blocks", layers),
        *merger(f"{root}.merger", width),
        *stack(f"{root}.deepstack_merger_list", mergers),
    )
    return Tower(tensors, out)
