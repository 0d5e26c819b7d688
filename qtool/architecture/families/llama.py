"""Llama and the decoders that differ from it by a bias, a norm, a fusion or a sliding window.

The keyword arguments of `read_sizes` are transformers' defaults for the model type.
"""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.cache import CacheLayer
from qtool.architecture.config import MAX_TENSORS, Config
from qtool.architecture.decoder import (
    PRE_NORMS,
    Body,
    Layer,
    Sizes,
    attention,
    attention_cache,
    decoder,
    gated_mlp,
    head_norms,
    norms,
    plain_mlp,
    read_sizes,
    stack,
)
from qtool.architecture.parts import Tensors, linear, norm


def llama(config: Config) -> Body:
    """llama (Llama 1 to 3, SmolLM2, TinyLlama, ...), and granite, which adds only multipliers."""
    sizes = read_sizes(
        config, hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32000, context=2048
    )
    config.require_divisible("hidden_size", sizes.hidden, sizes.num_heads, "num_attention_heads")
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *gated_mlp(f"{name}.mlp", sizes, bias=mlp_bias),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(config, sizes)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def mistral(config: Config) -> Body:
    """mistral: no biases, every layer slides where `sliding_window` is set."""
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

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(config, sizes, window=4096)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def qwen2(config: Config) -> Body:
    """qwen2 (Qwen 2 and 2.5): query, key and value projections have biases."""
    sizes = _qwen_sizes(config)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=True),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    return _qwen(config, sizes, layer)


def qwen3(config: Config) -> Body:
    """qwen3: queries and keys are normed per head."""
    sizes = _qwen_sizes(config, head_dim=128)
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *head_norms(f"{name}.self_attn", sizes),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    return _qwen(config, sizes, layer)


def _qwen_sizes(config: Config, head_dim: int | None = None) -> Sizes:
    return read_sizes(
        config,
        hidden=4096,
        intermediate=22016,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=head_dim,
        vocab=151936,
        context=32768,
    )


def _qwen(config: Config, sizes: Sizes, layer: Layer) -> Body:
    """Where `use_sliding_window` is set, the layers from `max_window_layers` on slide."""
    first = config.whole("max_window_layers", 28)
    cache = attention_cache(
        config,
        sizes,
        window=4096,
        enabled=config.flag("use_sliding_window", False),
        sliding=lambda index: index >= first,
    )
    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def olmo(config: Config) -> Body:
    """olmo: norms without parameters."""
    sizes = _olmo_sizes(config)
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *gated_mlp(f"{name}.mlp", sizes),
        )

    cache = attention_cache(config, sizes)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, final_norm=())


def olmo2(config: Config) -> Body:
    """olmo2: norms after attention and MLP, queries and keys normed over their whole width."""
    cache = attention_cache(config, _olmo_sizes(config))
    return _olmo2(config, cache)


def olmo3(config: Config) -> Body:
    """olmo3: olmo2, where three of four layers slide."""
    cache = attention_cache(
        config,
        _olmo_sizes(config),
        window=4096,
        sliding=lambda index: (index + 1) % 4 != 0,
    )
    return _olmo2(config, cache)


def _olmo_sizes(config: Config) -> Sizes:
    return read_sizes(
        config, hidden=4096, intermediate=11008, layers=32, heads=32, vocab=50304, context=2048
    )


def _olmo2(config: Config, cache: tuple[CacheLayer, ...]) -> Body:
    sizes = _olmo_sizes(config)
    bias = config.flag("attention_bias", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *norm(f"{name}.self_attn.q_norm", sizes.query_width),
            *norm(f"{name}.self_attn.k_norm", sizes.kv_width),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, "post_attention_layernorm", "post_feedforward_layernorm"),
        )

    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def smollm3(config: Config) -> Body:
    """smollm3: llama where every fourth layer has no rotary positions; those may slide."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=11008,
        layers=36,
        heads=16,
        kv_heads=4,
        vocab=128256,
        context=32768,
    )
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    rotary = config.items("no_rope_layers")
    period = config.count("no_rope_layer_interval", 4)
    if rotary is not None and len(rotary) < sizes.num_layers:
        config.reject("no_rope_layers", rotary, f"at least {sizes.num_layers} entries")

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *gated_mlp(f"{name}.mlp", sizes, bias=mlp_bias),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(
        config,
        sizes,
        enabled=config.flag("use_sliding_window", False),
        sliding=lambda index: not rotary[index] if rotary else (index + 1) % period == 0,
    )
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, tied=True)


def phi3(config: Config) -> Body:
    """phi3 (Phi 3, 3.5 and 4): fused qkv and gate-up projections."""
    sizes = read_sizes(
        config, hidden=3072, intermediate=8192, layers=32, heads=32, vocab=32064, context=4096
    )

    def layer(name: str) -> Tensors:
        qkv_width = sizes.query_width + 2 * sizes.kv_width
        return (
            *linear(f"{name}.self_attn.o_proj", sizes.hidden, sizes.query_width),
            *linear(f"{name}.self_attn.qkv_proj", qkv_width, sizes.hidden),
            *linear(f"{name}.mlp.gate_up_proj", 2 * sizes.intermediate, sizes.hidden),
            *linear(f"{name}.mlp.down_proj", sizes.hidden, sizes.intermediate),
            *norms(name, sizes.hidden, *PRE_NORMS),
        )

    cache = attention_cache(config, sizes)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache)


def phi(config: Config) -> Body:
    """phi (Phi 1, 1.5 and 2): biases everywhere, the head included, and a plain MLP."""
    sizes = read_sizes(
        config,
        hidden=2048,
        intermediate=8192,
        layers=24,
        heads=32,
        vocab=51200,
        context=2048,
        activation="gelu_new",
    )
    qk_norm = config.flag("qk_layernorm", False)

    def layer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        head_norm_names = ("q_layernorm", "k_layernorm") if qk_norm else ()
        return (
            *attention(own, sizes, qkv_bias=True, out_bias=True, out="dense"),
            *norms(own, sizes.hidden // sizes.num_heads, *head_norm_names, bias=True),
            *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", sizes.hidden, sizes.intermediate),
            *norms(name, sizes.hidden, "input_layernorm", bias=True),
        )

    cache = attention_cache(config, sizes)
    final_norm = norm("model.final_layernorm", sizes.hidden, bias=True)
    layers = [layer] * sizes.num_layers
    return decoder(config, sizes, layers, cache, final_norm=final_norm, head_bias=True)


def stablelm(config: Config) -> Body:
    """stablelm: LayerNorm with biases; StableLM 2 may norm each query and key head by itself."""
    sizes = read_sizes(
        config,
        hidden=2560,
        intermediate=6912,
        layers=32,
        heads=32,
        kv_heads=32,
        vocab=50304,
        context=4096,
    )
    head_dim = config.require_divisible(
        "hidden_size", sizes.hidden, sizes.num_heads, "num_attention_heads"
    )
    sizes = replace(sizes, head_dim=head_dim)  # the type knows no head_dim key
    bias = config.flag("use_qkv_bias", False)
    qk_norm = config.flag("qk_layernorm", False)
    if qk_norm and sizes.num_layers * sizes.num_heads > MAX_TENSORS:
        most = MAX_TENSORS // sizes.num_layers
        config.reject("num_attention_heads", sizes.num_heads, f"at most {most} heads with norms")
    layer_norms = PRE_NORMS[:1] if config.flag("use_parallel_residual", False) else PRE_NORMS

    def per_head(name: str, heads: int) -> Tensors:
        return stack(f"{name}.norms", [lambda head: norm(head, sizes.head_dim)] * heads)

    def layer(name: str) -> Tensors:
        own = f"{name}.self_attn"
        return (
            *attention(own, sizes, qkv_bias=bias),
            *(per_head(f"{own}.q_layernorm", sizes.num_heads) if qk_norm else ()),
            *(per_head(f"{own}.k_layernorm", sizes.num_kv_heads) if qk_norm else ()),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, *layer_norms, bias=True),
        )

    cache = attention_cache(config, sizes)
    final_norm = norm("model.norm", sizes.hidden, bias=True)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, final_norm=final_norm)


def starcoder2(config: Config) -> Body:
    """starcoder2: LayerNorm, biases and a plain MLP with GPT-2's names."""
    sizes = read_sizes(
        config,
        hidden=3072,
        intermediate=12288,
        layers=30,
        heads=24,
        kv_heads=2,
        vocab=49152,
        context=4096,
        activation="gelu_pytorch_tanh",
    )
    bias = config.flag("use_bias", True)

    def layer(name: str) -> Tensors:
        up, down = f"{name}.mlp.c_fc", f"{name}.mlp.c_proj"
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *plain_mlp(up, down, sizes.hidden, sizes.intermediate, bias=bias),
            *norms(name, sizes.hidden, *PRE_NORMS, bias=True),
        )

    cache = attention_cache(config, sizes)
    final_norm = norm("model.norm", sizes.hidden, bias=True)
    layers = [layer] * sizes.num_layers
    return decoder(config, sizes, layers, cache, final_norm=final_norm, tied=True)


def cohere(config: Config) -> Body:
    """cohere (Command R): one norm per layer for attention and MLP side by side, tied head."""
    sizes = read_sizes(
        config, hidden=8192, intermediate=22528, layers=40, heads=64, vocab=256000, context=8192
    )
    bias, qk_norm = config.flag("attention_bias", False), config.flag("use_qk_norm", False)

    def layer(name: str) -> Tensors:
        return (
            *attention(f"{name}.self_attn", sizes, qkv_bias=bias, out_bias=bias),
            *(head_norms(f"{name}.self_attn", sizes, separate=True) if qk_norm else ()),
            *gated_mlp(f"{name}.mlp", sizes),
            *norms(name, sizes.hidden, "input_layernorm"),
        )

    cache = attention_cache(config, sizes)
    return decoder(config, sizes, [layer] * sizes.num_layers, cache, tied=True)
