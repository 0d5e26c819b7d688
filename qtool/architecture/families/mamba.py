"""Mamba 2: no attention, a recurrent state of fixed size instead of a cache."""

from __future__ import annotations

from qtool.architecture.config import Config
from qtool.architecture.decoder import Body, Sizes, stack
from qtool.architecture.parts import Tensors, convolution, embedding, linear, norm, parameter
from qtool.architecture.stored_names import StoredNames


def mamba2(config: Config) -> Body:
    """mamba2 (Mamba-2, Codestral Mamba)."""
    hidden = config.count("hidden_size", 4096)
    inner = hidden * config.count("expand", 2)
    heads, head_dim = config.count("num_heads", 128), config.count("head_dim", 64)
    if heads * head_dim != inner:
        config.reject("num_heads", heads, f"hidden_size * expand / head_dim ({inner / head_dim:g})")
    conv_width = inner + 2 * config.count("n_groups", 8) * config.count("state_size", 128)
    kernel = config.count("conv_kernel", 4)
    bias, conv_bias = config.flag("use_bias", False), config.flag("use_conv_bias", True)
    sizes = Sizes(
        num_layers=config.num_layers("num_hidden_layers", 64),
        hidden=hidden,
        intermediate=inner,
        num_heads=heads,
        num_kv_heads=0,
        head_dim=head_dim,
        vocab=config.count("vocab_size", 32768),
        max_context=None,
    )

    def layer(name: str) -> Tensors:
        mixer = f"{name}.mixer"
        return (
            *norm(f"{name}.norm", hidden),
            *parameter(f"{mixer}.dt_bias", heads),
            *parameter(f"{mixer}.A_log", heads),
            *parameter(f"{mixer}.D", heads),
            *convolution(f"{mixer}.conv1d", conv_width, 1, kernel, bias=conv_bias),
            *linear(f"{mixer}.in_proj", inner + conv_width + heads, hidden, bias=bias),
            *norm(f"{mixer}.norm", inner),
            *linear(f"{mixer}.out_proj", hidden, inner, bias=bias),
        )

    return Body(
        sizes=sizes,
        tensors=(
            *embedding("backbone.embeddings", sizes.vocab, hidden),
            *stack("backbone.layers", [layer] * sizes.num_layers),
            *norm("backbone.norm_f", hidden),
        ),
        embedding="backbone.embeddings",
        head_inputs=hidden,
        tied=config.flag("tie_word_embeddings", False),
        cache_layers=(),
        stored_names=StoredNames("backbone"),
        unmodelled=("recurrent state of the Mamba layers",),
    )
