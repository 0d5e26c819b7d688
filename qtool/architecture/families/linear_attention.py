"""Hybrids of linear attention (the gated delta rule) and full attention: Qwen3-Next, Qwen3.5.

A linear layer keeps a convolution's last inputs and one matrix per head, whatever the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtool.architecture.cache import AttentionCache, CacheLayer, RecurrentState
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    ROTARY_BUFFER,
    Body,
    Layer,
    Sizes,
    decoder,
    head_norms,
    layer_types,
    read_experts,
    read_sizes,
)
from qtool.architecture.families.moe import (
    EXPERT_NAMES,
    MTP,
    block,
    dense_mlp,
    gated_shared_expert,
    qwen_layers,
    sparse_decoder,
)
from qtool.architecture.parts import Tensors, convolution, linear, norm, parameter
from qtool.architecture.records import Experts
from qtool.architecture.stored_names import PER_EXPERT, StoredNames

_TEXT_NAMES = StoredNames(
    "model",
    renames=((r"^model\.language_model\.", "model."), *PER_EXPERT),
    ignored=(ROTARY_BUFFER, MTP, (r"^model\.visual\.", "the vision tower, not in this class")),
)


def qwen3_next(config: Config) -> Body:
    """qwen3_next: a mixture with a shared expert; the linear layers fuse their projections."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=5632,
        layers=48,
        heads=16,
        kv_heads=2,
        head_dim=256,
        vocab=151936,
        context=32768,
    )
    shared = config.count("shared_expert_intermediate_size", 512)
    mixture = read_experts(config, "num_experts", 512, per_token=10, width=512, shared_width=shared)
    rule = _DeltaRule.read(config)
    kinds = _kinds(config, sizes)
    mlp = gated_shared_expert(sizes, mixture)
    per_kind = {
        "linear_attention": qwen_layers(config, sizes, _fused_delta_rule(sizes, rule), mlp),
        "full_attention": qwen_layers(config, sizes, _gated_attention(config, sizes), mlp),
    }
    layers = [per_kind[kind][index] for index, kind in enumerate(kinds)]
    cache = _cache(sizes, rule, kinds)
    return sparse_decoder(config, sizes, mixture, layers, cache=cache, names=EXPERT_NAMES)


def qwen3_5_text(config: Config, root: str = "model") -> Body:
    """qwen3_5_text: the dense hybrid; it also loads from the multimodal checkpoint."""
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
    return _qwen3_5(config, sizes, dense_mlp(sizes), root)


def qwen3_5_moe_text(config: Config, root: str = "model") -> Body:
    """qwen3_5_moe_text: the hybrid with a mixture and a shared expert in every layer."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=512,
        layers=40,
        heads=16,
        kv_heads=2,
        head_dim=256,
        vocab=248320,
        context=32768,
    )
    shared = config.count("shared_expert_intermediate_size", 512)
    mixture = read_experts(config, "num_experts", 256, per_token=8, width=512, shared_width=shared)
    # There is no dense MLP; the widest that a token passes alone is the shared expert.
    sizes = replace(sizes, intermediate=shared)
    return _qwen3_5(config, sizes, gated_shared_expert(sizes, mixture), root, mixture)


def _qwen3_5(
    config: Config, sizes: Sizes, mlp: Layer, root: str, mixture: Experts | None = None
) -> Body:
    rule = _DeltaRule.read(config)
    kinds = _kinds(config, sizes)
    mixers = {
        "linear_attention": _delta_rule(sizes, rule),
        "full_attention": _gated_attention(config, sizes),
    }
    return decoder(
        config,
        sizes,
        [block(sizes, mixers[kind], mlp) for kind in kinds],
        _cache(sizes, rule, kinds),
        root=root,
        stored_names=_TEXT_NAMES,
        experts=mixture,
    )


def _kinds(config: Config, sizes: Sizes) -> list[str]:
    """Three layers of linear attention, then one of full attention, unless the config says."""
    period = config.count("full_attention_interval", 4)
    return layer_types(
        config,
        sizes.num_layers,
        lambda index: "linear_attention" if (index + 1) % period else "full_attention",
        ("linear_attention", "full_attention"),
    )


@dataclass(frozen=True, slots=True)
class _DeltaRule:
    """Sizes of the linear layers: heads and their widths, and the convolution's kernel."""

    key_heads: int
    key_head_dim: int
    value_heads: int
    value_head_dim: int
    kernel: int

    @classmethod
    def read(cls, config: Config) -> _DeltaRule:
        """The sizes under their keys."""
        return cls(
            config.count("linear_num_key_heads", 16),
            config.count("linear_key_head_dim", 128),
            config.count("linear_num_value_heads", 32),
            config.count("linear_value_head_dim", 128),
            config.count("linear_conv_kernel_dim", 4),
        )

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_head_dim

    @property
    def convolved(self) -> int:
        """Width of queries, keys and values, which pass the convolution."""
        return 2 * self.key_heads * self.key_head_dim + self.values


def _cache(sizes: Sizes, rule: _DeltaRule, kinds: Sequence[str]) -> tuple[CacheLayer, ...]:
    full = AttentionCache(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
    linear_layer = RecurrentState(
        conv_elements=rule.convolved * rule.kernel,
        state_elements=rule.values * rule.key_head_dim,
    )
    return tuple(full if kind == "full_attention" else linear_layer for kind in kinds)


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


def _delta_rule(sizes: Sizes, rule: _DeltaRule) -> Layer:
    def mixer(name: str) -> Tensors:
        own, hidden = f"{name}.linear_attn", sizes.hidden
        return (
            *_decay_and_convolution(own, rule),
            *norm(f"{own}.norm", rule.value_head_dim),
            *linear(f"{own}.out_proj", hidden, rule.values),
            *linear(f"{own}.in_proj_qkv", rule.convolved, hidden),
            *linear(f"{own}.in_proj_z", rule.values, hidden),
            *linear(f"{own}.in_proj_b", rule.value_heads, hidden),
            *linear(f"{own}.in_proj_a", rule.value_heads, hidden),
        )

    return mixer


def _fused_delta_rule(sizes: Sizes, rule: _DeltaRule) -> Layer:
    def mixer(name: str) -> Tensors:
        own, hidden = f"{name}.linear_attn", sizes.hidden
        return (
            *_decay_and_convolution(own, rule),
            *linear(f"{own}.in_proj_qkvz", rule.convolved + rule.values, hidden),
            *linear(f"{own}.in_proj_ba", 2 * rule.value_heads, hidden),
            *norm(f"{own}.norm", rule.value_head_dim),
            *linear(f"{own}.out_proj", hidden, rule.values),
        )

    return mixer


def _decay_and_convolution(own: str, rule: _DeltaRule) -> Tensors:
    return (
        *parameter(f"{own}.dt_bias", rule.value_heads),
        *parameter(f"{own}.A_log", rule.value_heads),
        *convolution(f"{own}.conv1d", rule.convolved, 1, rule.kernel, bias=False),
    )
