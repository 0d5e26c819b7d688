"""The GPT-2 line: LayerNorm, a plain MLP, mostly a fused query-key-value projection."""

from __future__ import annotations

from qtool.architecture.cache import AttentionCache
from qtool.architecture.config import Config
from qtool.architecture.decoder import (
    ROTARY_BUFFER,
    Body,
    Sizes,
    norms,
    plain_mlp,
    stack,
    whole_context,
)
from qtool.architecture.parts import Tensors, conv1d, embedding, linear, norm
from qtool.architecture.stored_names import StoredNames
from qtool.errors import QtoolError

_MASK = "a causal mask, which the model computes itself"


def gpt2(config: Config) -> Body:
    """gpt2: Conv1D layers, which store their weights transposed."""
    if config.flag("add_cross_attention", False):
        raise QtoolError(
            "config.json: add_cross_attention: GPT-2 with cross attention is not supported",
            kind="unsupported",
            hint="use a GPT-2 checkpoint without an encoder",
        )
    hidden = config.count("n_embd", 768, alias="hidden_size")
    heads = config.count("n_head", 12, alias="num_attention_heads")
    positions = config.count("n_positions", 1024, alias="max_position_embeddings")
    sizes = Sizes(
        num_layers=config.num_layers("n_layer", 12, alias="num_hidden_layers"),
        hidden=hidden,
        intermediate=config.optional_count("n_inner") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.require_divisible("n_embd", hidden, heads, "n_head"),
        vocab=config.count("vocab_size", 50257),
        max_context=positions,
        activation=config.text("activation_function") or "gelu_new",
    )

    def layer(name: str) -> Tensors:
        return (
            *norms(name, hidden, "ln_1", bias=True),
            *conv1d(f"{name}.attn.c_attn", 3 * hidden, hidden),
            *conv1d(f"{name}.attn.c_proj", hidden, hidden),
            *norms(name, hidden, "ln_2", bias=True),
            *conv1d(f"{name}.mlp.c_fc", sizes.intermediate, hidden),
            *conv1d(f"{name}.mlp.c_proj", hidden, sizes.intermediate),
        )

    return Body(
        sizes=sizes,
        tensors=(
            *embedding("transformer.wte", sizes.vocab, hidden),
            *embedding("transformer.wpe", positions, hidden),
            *stack("transformer.h", [layer] * sizes.num_layers),
            *norm("transformer.ln_f", hidden, bias=True),
        ),
        embedding="transformer.wte",
        head_inputs=hidden,
        tied=config.flag("tie_word_embeddings", True),
        cache_layers=whole_context(sizes),
        stored_names=StoredNames("transformer", ignored=((r"\.attn\.(masked_)?bias$", _MASK),)),
    )


def gpt_neox(config: Config) -> Body:
    """gpt_neox (Pythia, GPT-NeoX-20B)."""
    sizes = _sizes(
        config,
        hidden=6144,
        layers=44,
        heads=64,
        vocab=50432,
        intermediate=24576,
        activation="gelu",
    )
    bias = config.flag("attention_bias", True)

    def layer(name: str) -> Tensors:
        own = f"{name}.attention"
        return (
            *norms(name, sizes.hidden, "input_layernorm", "post_attention_layernorm", bias=True),
            *linear(f"{own}.query_key_value", 3 * sizes.hidden, sizes.hidden, bias=bias),
            *linear(f"{own}.dense", sizes.hidden, sizes.hidden, bias=bias),
            *_h_to_4h(f"{name}.mlp", sizes),
        )

    return Body(
        sizes=sizes,
        tensors=(
            *embedding("gpt_neox.embed_in", sizes.vocab, sizes.hidden),
            *stack("gpt_neox.layers", [layer] * sizes.num_layers),
            *norm("gpt_neox.final_layer_norm", sizes.hidden, bias=True),
        ),
        embedding="gpt_neox.embed_in",
        head_inputs=sizes.hidden,
        tied=config.flag("tie_word_embeddings", False),
        cache_layers=whole_context(sizes),
        stored_names=StoredNames(
            "gpt_neox",
            renames=((r"^embed_out\.", "lm_head."),),
            ignored=(ROTARY_BUFFER, (r"\.attention\.(masked_)?bias$", _MASK)),
        ),
    )


def bloom(config: Config) -> Body:
    """bloom: ALiBi instead of positions, so no limit on the context."""
    hidden = config.count("hidden_size", 64, alias="n_embed")
    heads = config.count("n_head", 8, alias="num_attention_heads")
    sizes = Sizes(
        num_layers=config.num_layers("n_layer", 2, alias="num_hidden_layers"),
        hidden=hidden,
        intermediate=4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.require_divisible("hidden_size", hidden, heads, "n_head"),
        vocab=config.count("vocab_size", 250880),
        max_context=None,
        activation="bloom_gelu",  # its own, which no key names
    )

    def layer(name: str) -> Tensors:
        own = f"{name}.self_attention"
        return (
            *norms(name, hidden, "input_layernorm", bias=True),
            *linear(f"{own}.query_key_value", 3 * hidden, hidden, bias=True),
            *linear(f"{own}.dense", hidden, hidden, bias=True),
            *norms(name, hidden, "post_attention_layernorm", bias=True),
            *_h_to_4h(f"{name}.mlp", sizes),
        )

    return Body(
        sizes=sizes,
        tensors=(
            *embedding("transformer.word_embeddings", sizes.vocab, hidden),
            *norm("transformer.word_embeddings_layernorm", hidden, bias=True),
            *stack("transformer.h", [layer] * sizes.num_layers),
            *norm("transformer.ln_f", hidden, bias=True),
        ),
        embedding="transformer.word_embeddings",
        head_inputs=hidden,
        tied=config.flag("tie_word_embeddings", True),
        cache_layers=whole_context(sizes),
        stored_names=StoredNames("transformer"),
    )


def falcon(config: Config) -> Body:
    """falcon: its linear layers are a subclass of nn.Linear, so bitsandbytes replaces none."""
    new = config.flag("new_decoder_architecture", False)
    multi_query = config.flag("multi_query", True) and not new
    sizes = _falcon_sizes(config, new=new, multi_query=multi_query)
    bias = config.flag("bias", False)
    layer_norms = _falcon_norms(config, new=new)
    hidden, qkv_width = sizes.hidden, sizes.query_width + 2 * sizes.kv_width

    def subclass(name: str, outputs: int, inputs: int) -> Tensors:
        return linear(name, outputs, inputs, bias=bias, replaceable=False)

    def layer(name: str) -> Tensors:
        return (
            *subclass(f"{name}.self_attention.query_key_value", qkv_width, hidden),
            *subclass(f"{name}.self_attention.dense", hidden, hidden),
            *subclass(f"{name}.mlp.dense_h_to_4h", sizes.intermediate, hidden),
            *subclass(f"{name}.mlp.dense_4h_to_h", hidden, sizes.intermediate),
            *norms(name, hidden, *layer_norms, bias=True),
        )

    # The new architecture repeats keys and values for every query head before it caches them.
    cached_heads = sizes.num_heads if new else sizes.num_kv_heads
    cache_layer = AttentionCache(cached_heads, sizes.head_dim, sizes.head_dim)
    return Body(
        sizes=sizes,
        tensors=(
            *embedding("transformer.word_embeddings", sizes.vocab, hidden),
            *stack("transformer.h", [layer] * sizes.num_layers),
            *norm("transformer.ln_f", hidden, bias=True),
        ),
        embedding="transformer.word_embeddings",
        head_inputs=hidden,
        tied=config.flag("tie_word_embeddings", True),
        cache_layers=(cache_layer,) * sizes.num_layers,
        stored_names=StoredNames("transformer", ignored=(ROTARY_BUFFER,)),
    )


def _falcon_sizes(config: Config, *, new: bool, multi_query: bool) -> Sizes:
    hidden = config.count("hidden_size", 4544, alias="n_embed")
    heads = config.count("num_attention_heads", 71)
    kv_heads = config.optional_count("num_kv_heads") or heads
    return Sizes(
        num_layers=config.num_layers("num_hidden_layers", 32),
        hidden=hidden,
        intermediate=config.optional_count("ffn_hidden_size") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads if new else 1 if multi_query else heads,
        head_dim=config.require_divisible("hidden_size", hidden, heads, "num_attention_heads"),
        vocab=config.count("vocab_size", 65024),
        max_context=config.count("max_position_embeddings", 2048),
        activation=config.text("activation") or "gelu",
    )


def _falcon_norms(config: Config, *, new: bool) -> tuple[str, ...]:
    """The norms of a layer: one in front of each branch, a shared one, or one after the other."""
    num_norms = config.optional_count("num_ln_in_parallel_attn") or (2 if new else 1)
    if not config.flag("parallel_attn", True):
        return ("post_attention_layernorm", "input_layernorm")
    return ("ln_attn", "ln_mlp") if num_norms == 2 else ("input_layernorm",)


def opt(config: Config) -> Body:
    """opt: learned positions; OPT-350m embeds into a narrower space and norms afterwards."""
    sizes = _sizes(
        config,
        hidden=768,
        layers=12,
        heads=12,
        vocab=50272,
        intermediate=3072,
        activation="relu",
        activation_key="activation_function",
        mlp_key="ffn_dim",
    )
    hidden, root = sizes.hidden, "model.decoder"
    embedded = config.optional_count("word_embed_proj_dim") or hidden
    bias, affine = (
        config.flag("enable_bias", True),
        config.flag("layer_norm_elementwise_affine", True),
    )

    def layer_norm(name: str) -> Tensors:
        return norm(name, hidden, bias=True) if affine else ()

    def layer(name: str) -> Tensors:
        projections = ("k_proj", "v_proj", "q_proj", "out_proj")
        return (
            *(
                tensor
                for projection in projections
                for tensor in linear(f"{name}.self_attn.{projection}", hidden, hidden, bias=bias)
            ),
            *layer_norm(f"{name}.self_attn_layer_norm"),
            *plain_mlp(f"{name}.fc1", f"{name}.fc2", hidden, sizes.intermediate, bias=bias),
            *layer_norm(f"{name}.final_layer_norm"),
        )

    narrower = embedded != hidden
    last_norm = config.flag("do_layer_norm_before", True) and not config.flag(
        "_remove_final_layer_norm", False
    )
    positions = config.count("max_position_embeddings", 2048) + 2  # OPT's two unused rows
    return Body(
        sizes=sizes,
        tensors=(
            *embedding(f"{root}.embed_tokens", sizes.vocab, embedded),
            *embedding(f"{root}.embed_positions", positions, hidden),
            *(linear(f"{root}.project_out", embedded, hidden) if narrower else ()),
            *(linear(f"{root}.project_in", hidden, embedded) if narrower else ()),
            *(layer_norm(f"{root}.final_layer_norm") if last_norm else ()),
            *stack(f"{root}.layers", [layer] * sizes.num_layers),
        ),
        embedding=f"{root}.embed_tokens",
        head_inputs=embedded,
        tied=config.flag("tie_word_embeddings", True),
        cache_layers=whole_context(sizes),
        stored_names=StoredNames("model"),
    )


def _sizes(
    config: Config,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vocab: int,
    intermediate: int,
    activation: str,
    activation_key: str = "hidden_act",
    mlp_key: str = "intermediate_size",
) -> Sizes:
    """Sizes under the usual keys, where every head has keys of its own and hidden / heads wide."""
    hidden, heads = config.count("hidden_size", hidden), config.count("num_attention_heads", heads)
    return Sizes(
        num_layers=config.num_layers("num_hidden_layers", layers),
        hidden=hidden,
        intermediate=config.count(mlp_key, intermediate),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.require_divisible("hidden_size", hidden, heads, "num_attention_heads"),
        vocab=config.count("vocab_size", vocab),
        max_context=config.count("max_position_embeddings", 2048),
        activation=config.text(activation_key) or activation,
    )


def _h_to_4h(name: str, sizes: Sizes) -> Tensors:
    up, down = f"{name}.dense_h_to_4h", f"{name}.dense_4h_to_h"
    return plain_mlp(up, down, sizes.hidden, sizes.intermediate)
