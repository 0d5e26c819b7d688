"""Mamba 1 and 2: no attention, a recurrent state of fixed size instead of a cache.

Their mixers also serve the hybrids in `hybrid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtool.architecture.cache import RecurrentState
from qtool.architecture.config import Config
from qtool.architecture.decoder import Body, Sizes, stack
from qtool.architecture.parts import Tensors, convolution, embedding, linear, norm, parameter
from qtool.architecture.stored_names import StoredNames


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveScan:
    """Mamba 1: every one of `inner` channels has a state of `state_size`."""

    hidden: int
    inner: int
    state_size: int
    rank: int  # of the projection that makes the time steps
    kernel: int
    bias: bool
    conv_bias: bool

    def mixer(self, name: str, *, normed: bool = False) -> Tensors:
        """The parameters; `normed` as in Jamba, with norms of time steps, inputs and outputs."""
        own_norms = (("dt", self.rank), ("b", self.state_size), ("c", self.state_size))
        return (
            *parameter(f"{name}.A_log", self.inner, self.state_size),
            *parameter(f"{name}.D", self.inner),
            *convolution(f"{name}.conv1d", self.inner, 1, self.kernel, bias=self.conv_bias),
            *linear(f"{name}.in_proj", 2 * self.inner, self.hidden, bias=self.bias),
            *linear(f"{name}.x_proj", self.rank + 2 * self.state_size, self.inner),
            *linear(f"{name}.dt_proj", self.inner, self.rank, bias=True),
            *linear(f"{name}.out_proj", self.hidden, self.inner, bias=self.bias),
            *(
                tensor
                for part, width in (own_norms if normed else ())
                for tensor in norm(f"{name}.{part}_layernorm", width)
            ),
        )

    @property
    def state(self) -> RecurrentState:
        """What it keeps between tokens."""
        return RecurrentState(self.inner * self.kernel, self.inner * self.state_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Scan:
    """Mamba 2: heads with a state of `head_dim` x `state_size` each; `groups` share inputs."""

    hidden: int
    heads: int
    head_dim: int
    state_size: int
    groups: int
    kernel: int
    bias: bool
    conv_bias: bool

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: values, and the inputs and outputs of the state."""
        return self.inner + 2 * self.groups * self.state_size

    def mixer(self, name: str) -> Tensors:
        """The parameters."""
        projected = self.inner + self.conv_width + self.heads
        return (
            *parameter(f"{name}.dt_bias", self.heads),
            *parameter(f"{name}.A_log", self.heads),
            *parameter(f"{name}.D", self.heads),
            *convolution(f"{name}.conv1d", self.conv_width, 1, self.kernel, bias=self.conv_bias),
            *linear(f"{name}.in_proj", projected, self.hidden, bias=self.bias),
            *norm(f"{name}.norm", self.inner),
            *linear(f"{name}.out_proj", self.hidden, self.inner, bias=self.bias),
        )

    @property
    def state(self) -> RecurrentState:
        """What it keeps between tokens."""
        return RecurrentState(self.conv_width * self.kernel, self.inner * self.state_size)


def mamba(config: Config) -> Body:
    """mamba (Mamba 1), and falcon_mamba, whose additional norms have no weights."""
    hidden = config.count("hidden_size", 768)
    scan = SelectiveScan(
        hidden=hidden,
        inner=hidden * config.count("expand", 2),
        state_size=config.count("state_size", 16),
        rank=time_step_rank(config, "time_step_rank", hidden),
        kernel=config.count("conv_kernel", 4),
        bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
    )
    sizes = Sizes(
        num_layers=config.num_layers("num_hidden_layers", 32),
        hidden=hidden,
        intermediate=scan.inner,
        num_heads=1,
        num_kv_heads=0,
        head_dim=scan.inner,
        vocab=config.count("vocab_size", 50280),
        max_context=None,
    )
    return _backbone(config, sizes, scan.mixer, scan.state, tied=True)


def mamba2(config: Config) -> Body:
    """mamba2 (Mamba-2, Codestral Mamba)."""
    hidden = config.count("hidden_size", 4096)
    inner = hidden * config.count("expand", 2)
    heads, head_dim = config.count("num_heads", 128), config.count("head_dim", 64)
    if heads * head_dim != inner:
        config.reject("num_heads", heads, f"hidden_size * expand / head_dim ({inner / head_dim:g})")
    scan = Mamba2Scan(
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        state_size=config.count("state_size", 128),
        groups=config.count("n_groups", 8),
        kernel=config.count("conv_kernel", 4),
        bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
    )
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
    return _backbone(config, sizes, scan.mixer, scan.state, tied=False)


def time_step_rank(config: Config, key: str, hidden: int) -> int:
    """A number, or "auto" for a 16th of the hidden size, rounded up."""
    return config.count_or_auto(key) or -(-hidden // 16)


def _backbone(
    config: Config,
    sizes: Sizes,
    mixer: Callable[[str], Tensors],
    state: RecurrentState,
    *,
    tied: bool,
) -> Body:
    def layer(name: str) -> Tensors:
        return (*norm(f"{name}.norm", sizes.hidden), *mixer(f"{name}.mixer"))

    return Body(
        sizes=sizes,
        tensors=(
            *embedding("backbone.embeddings", sizes.vocab, sizes.hidden),
            *stack("backbone.layers", [layer] * sizes.num_layers),
            *norm("backbone.norm_f", sizes.hidden),
        ),
        embedding="backbone.embeddings",
        head_inputs=sizes.hidden,
        tied=config.flag("tie_word_embeddings", tied),
        cache_layers=(state,) * sizes.num_layers,
        stored_names=StoredNames("backbone"),
    )
