"""The operations of a decoder's block, called on a GPU before there is a model.

PyTorch loads a kernel when it is called for the first time, and cuBLAS with the first product: half
a second in all for what transformers' blocks call, with which a decoder is compared before the
first token. While modules are imported the driver has nothing else to do; beside the reading of
weights the same calls hold that up for as long as they take.

What is called counts here, not what it computes; what a model calls beside it is loaded later.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

NUM_TOKENS: Final = (4, 1)  # one alone has kernels of its own
NUM_HEADS: Final = 2
CAPACITY: Final = 256  # of the cache that decoders are compared over
VOCABULARY_SIZE: Final = 64


def call_operations(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Embedding, norm, rotary embedding, attention over a cache, gate and head, over zeros."""
    width = NUM_HEADS * head_dim
    with torch.inference_mode(), device:
        table = torch.zeros(VOCABULARY_SIZE, width, dtype=dtype)
        for num_tokens in NUM_TOKENS:
            positions = torch.arange(num_tokens)
            hidden = _norm(functional.embedding(positions[None], table), table[0])
            queries = hidden.view(1, num_tokens, NUM_HEADS, head_dim).transpose(1, 2)
            mixed = _attend(_turn(queries, positions), positions).transpose(1, 2)
            hidden = hidden + mixed.reshape(1, num_tokens, width)
            hidden = hidden + functional.silu(hidden) * hidden
            logits = functional.linear(hidden, table).float()
            (logits - logits).abs().max() / logits.abs().max()  # how they are compared
            logits[:, -1].argmax(-1)


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(hidden.dtype)


def _turn(queries: Tensor, positions: Tensor) -> Tensor:
    """Queries (1, heads, num_tokens, head_dim) by angles of the positions (num_tokens,)."""
    half = queries.shape[-1] // 2
    frequencies = torch.zeros(half)[None, :, None].float().expand(1, -1, 1)
    angles = (frequencies @ positions[None, None, :].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cosines, sines = ((it * 1.0).to(queries.dtype)[:, None] for it in (angles.cos(), angles.sin()))
    rotated = torch.cat((-queries[..., half:], queries[..., :half]), dim=-1)
    return queries * cosines + rotated * sines


def _attend(queries: Tensor, positions: Tensor) -> Tensor:
    """Over keys that two heads share, where each position sees those up to its own."""
    keys = torch.zeros(1, 1, CAPACITY, queries.shape[-1], dtype=queries.dtype)
    keys.index_copy_(2, positions, queries[:, :1])
    keys = keys.expand(-1, NUM_HEADS, -1, -1).reshape(1, NUM_HEADS, CAPACITY, -1)
    mask = torch.arange(CAPACITY)[None, :] <= positions[:, None]
    return functional.scaled_dot_product_attention(
        queries, keys, keys, attn_mask=mask[None, None], scale=0.1
    )
