"""Whether a model keeps packed sequences apart, which it is asked before it is trained on some.

    require_apart(network, device, torch.bfloat16)

Where a sequence begins is told by positions that begin again, and by numbers and lengths of the
sequences for kernels that want those. Some models make their masks without any of it, and a state
that is carried from token to token is carried on. No list of model types says which do: kernels
that are installed decide too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qtool.errors import Option, QtoolError

LENGTH: Final = 8  # tokens of each of the three sequences
# What moves by less than this share of what the middle's own logits move is rounding, and so is
# what moves about as much as where nothing can be seen. Models that leak were found to move by
# half and more, by 0.0014 where their weights are random and small; others by nothing.
LEAST: Final = 1e-3
ROUNDINGS: Final = 2  # steps of the dtype, beside it
TIMES_ROUNDING: Final = 4.0


def require_apart(network: Any, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise QtoolError (unsupported) if `network` would see more than one of packed sequences.

    It is given [first | middle | last] as the trainer packs them, and again with another middle.
    Nothing of `last` may depend on it. Nor can anything of `first`, which is before: what moves
    there is rounding, of experts that other tokens come to as well, or of columns that INT8 keeps
    apart for all tokens at once.
    """
    try:
        with _asking(network, device, compute_dtype):
            one, other = (_logits(network, device, parts) for parts in _packed_ids(network))
    except (NotImplementedError, TypeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _refusal(network, f"cannot train on packed sequences: {first_line}") from error
    rounding, change, leak = (float(moved) for moved in _moved(one, other))
    least = LEAST + ROUNDINGS * torch.finfo(compute_dtype).eps
    if leak > max(least * change, TIMES_ROUNDING * rounding):
        raise _refusal(network, "does not keep packed sequences apart: each sees those before it")


def _refusal(network: Any, what: str) -> QtoolError:
    model = network.get_base_model() if hasattr(network, "peft_config") else network
    return QtoolError(
        f"{type(model).__name__} {what}",
        kind="unsupported",
        hint=("leave out ", Option("packing")),
    )


def _packed_ids(network: Any) -> Iterator[Tensor]:
    """int64 (3, LENGTH) twice, whose middle rows differ in every token."""
    num_tokens = network.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(num_tokens, (3, LENGTH), generator=generator)
    yield ids.clone()
    ids[1] = (ids[1] + num_tokens // 2) % num_tokens
    yield ids


def _logits(network: Any, device: torch.device, parts: Tensor) -> Tensor:
    """float32 (3, LENGTH, tokens): what the model says of each part, fed as the Trainer does."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": parts.flatten().tolist(), "seq_lengths": [LENGTH] * len(parts)}])
    del batch["labels"]  # with them there are no logits
    fed = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    logits: Tensor = network(**fed, use_cache=False).logits
    return logits.float().view(*parts.shape, -1)


def _moved(one: Tensor, other: Tensor) -> Tensor:
    """float32 (3,): how far the token of each part moved that moved farthest."""
    distances: Tensor = torch.linalg.vector_norm(one - other, dim=-1)
    return distances.amax(dim=-1)


@contextmanager
def _asking(network: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Without dropout and gradients, in the dtype of training; leaves all as it was."""
    in_training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            yield
    finally:
        for module in in_training:
            module.training = True
