"""What a layer keeps between tokens: keys and values, a compressed latent, or a state.

Only facts of the model. How many bytes a runtime makes of them is `planner/kv_cache.py`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """Per token keys of `num_kv_heads * head_dim` and values of `num_kv_heads * value_head_dim`.

    `window` limits the tokens kept (sliding attention); None keeps the whole context. `chunked`:
    attention looks back to the last multiple of `window` instead.
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None
    chunked: bool = False


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Multi-head latent attention: per token one latent that keys and values are made from, the
    rotated part of the key, and for sparse attention the key of the indexer that picks tokens."""

    latent_dim: int
    rope_dim: int
    index_head_dim: int = 0


@dataclass(frozen=True, slots=True)
class CompressedCache:
    """DeepSeek-V4: keys that are values too, exact for a window and compressed beyond it.

    Per token of the last `window` - 1 one key of `head_dim`. Every `rate` tokens make one entry of
    `entry_dim` elements, which stays; a token waits for its entry as `waiting_dim` elements. Where
    entries overlap, `overlap_elements` of the last one are kept in the model's dtype and as many,
    their gates, in float32, from the first entry on.
    """

    head_dim: int
    window: int
    rate: int
    entry_dim: int
    waiting_dim: int
    overlap_elements: int = 0


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """A state of fixed size per sequence, whatever the context: state space, linear attention.

    `conv_elements` are the last inputs of a convolution, in the model's dtype; `state_elements`
    are held in `state_dtype`, or the model's dtype where that is None.
    """

    conv_elements: int
    state_elements: int
    state_dtype: Literal["float32"] | None = "float32"


CacheLayer = AttentionCache | LatentCache | CompressedCache | RecurrentState
