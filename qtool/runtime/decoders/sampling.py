"""The next token from the logits: the same few operations on the CPU, on a GPU and in a graph.

Nothing here waits for the device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qtool.errors import Option, QtoolError
from qtool.runtime.decoders.protocol import Sampling

NO_TOKEN: Final = -1


def choose_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The token of each sequence.

    Args:
        logits: any float (batch, vocabulary).
        generator: on the device of `logits`; not used at temperature 0.

    Returns:
        int64 (batch,).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        scores = _keep_top_k(scores, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = _keep_top_p(scores, sampling.top_p)
    probabilities = scores.softmax(dim=-1)
    # The first of exponential clocks with these rates is a draw from them: what torch.multinomial
    # does too, but without its check of the probabilities, which would wait for the device.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / clocks).argmax(dim=-1)


def mark_nan(tokens: Tensor, logits: Tensor) -> Tensor:
    """`tokens` (batch,), but NO_TOKEN where the logits (batch, vocabulary) hold a NaN."""
    return tokens.masked_fill(logits.isnan().any(dim=-1), NO_TOKEN)


def require_tokens(tokens: Sequence[int]) -> None:
    """Raise QtoolError (bad_file) if one is NO_TOKEN: text made of such logits is garbage."""
    if NO_TOKEN in tokens:
        raise QtoolError(
            "the model's logits after the prompt are no numbers (NaN)",
            kind="bad_file",
            hint=(
                "weights that hold NaN or infinity give such, and so does what is too large for "
                "float16: get the model again, or try ",
                Option("compute_dtype", "float32"),
            ),
        )


def seed_generator(generator: torch.Generator, seed: int | None) -> None:
    """Begin at `seed`, or anywhere where there is none."""
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens whose probabilities reach `top_p` together; at least one."""
    ordered, indices = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the tokens that are likelier
    outside = before >= top_p
    outside[:, 0] = False
    return scores.masked_fill(outside.scatter(-1, indices, outside), -torch.inf)
