"""What the loss of a language model takes where its logits are made a chunk of tokens at a time.

That is how `qtool finetune` computes it (`qtool.finetune.loss`), whose chunks are those of
`chunk_tokens`. Models whose routers have a loss of their own keep TRL's way, which makes tiles of
tokens and words, and makes them anew in the backward pass. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from qtool.planner.training_layers import BF16, FP32, Alive

# Of the float32 logits that exist at a time; half as much again with their 16-bit forms.
CHUNK_BYTES: Final = 256 << 20
# Per logit of a chunk: float32 beside bf16. A soft cap keeps its slope in float32 instead.
CHUNK_LOGIT_BYTES: Final = FP32 + BF16
CAPPED_LOGIT_BYTES: Final = FP32 + FP32

# trl/kernels/chunked_logprob.py and trainer/utils.py, 1.16
TILE_TOKENS: Final = 4096
TILE_WORDS: Final = 32768


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are made at a time."""
    return max(CHUNK_BYTES // (FP32 * vocabulary), 1)


@dataclass(frozen=True, slots=True)
class PiecewiseLoss:
    """The loss over `tokens` hidden states of `hidden` elements, which are `state` bytes each.

    Args:
        weight: bytes per element of the head's weight.
        is_trained: whether that gets a gradient.
        is_tiled: TRL's way.
    """

    tokens: int
    hidden: int
    vocabulary: int
    state: int
    weight: int
    is_trained: bool
    is_capped: bool
    is_tiled: bool

    def moments(self) -> Iterable[tuple[str, Alive]]:
        """What is alive in its passes, beside what the final norm keeps."""
        states = self.tokens * self.hidden
        head = self.hidden * self.vocabulary
        sums = Alive(gradients=FP32 * head if self.is_trained else 0)
        read = Alive(self.state * states, weight_copies=BF16 * head if self.weight == FP32 else 0)
        if self.is_tiled:
            words = min(self.vocabulary, TILE_WORDS)
            tile = Alive(logits=BF16 * min(self.tokens, TILE_TOKENS) * words)
            yield "loss", read + tile
            yield "backward of the loss", read + tile + sums + Alive(FP32 * states)
            return
        chunk = min(self.tokens, chunk_tokens(self.vocabulary))
        per_logit = CAPPED_LOGIT_BYTES if self.is_capped else CHUNK_LOGIT_BYTES
        made = sums + Alive(BF16 * states)
        cast = Alive(BF16 * chunk * self.hidden if self.state == FP32 else 0)
        yield "loss", read + made + cast + Alive(logits=per_logit * chunk * self.vocabulary)
        rounded = self.weight * head if self.is_trained and self.weight != FP32 else 0
        widened = FP32 * states if self.state == FP32 else 0
        yield "backward of the loss", made + Alive(widened, gradients=rounded)
