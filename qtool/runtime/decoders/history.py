"""A decoder that lives across prompts: tokens that its cache holds already are not run again.

with History(loaded, min_capacity=4096) as history:
    for token_id in history.answer(prompt_ids, Sampling(), num_tokens=256): ...
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Final, Self

import torch

from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.protocol import Decoder, Sampling
from qtool.runtime.loading import LoadedModel

CHAT_CAPACITY: Final = 4096  # tokens that a conversation's cache begins with


class History:
    """One text at a time, each the next of a conversation or of a kind.

    Args:
        min_capacity: tokens that the cache has room for at least; it doubles when they do not do.
        max_capacity: tokens that no text will exceed, so that a cache need not be larger.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: DecoderOptions | None = None,
        *,
        min_capacity: int = 0,
        max_capacity: int | None = None,
    ) -> None:
        self._loaded = loaded
        self._options = options or DecoderOptions()
        self._min_capacity = min_capacity
        self._max_capacity = max_capacity
        self._decoder: Decoder | None = None
        self._held: list[int] = []  # the tokens in the decoder's cache
        self.num_run = 0  # tokens of the last prompt that were not in the cache before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the cache's memory back."""
        self.close()

    def close(self) -> None:
        """The same; the next text begins anew."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._held = None, []

    def decoder_for(self, num_tokens: int) -> Decoder:
        """The decoder, made or made larger if it has not room for `num_tokens`.

        Raises:
            QtoolError: its cache does not fit.
        """
        if self._decoder is None or self._decoder.capacity < num_tokens:
            capacity = self._enlarged_for(num_tokens)
            self.close()  # first: both may not fit
            self._decoder = choose_decoder(self._loaded, capacity, options=self._options)
        return self._decoder

    def answer(
        self, prompt_ids: Sequence[int], sampling: Sampling, num_tokens: int
    ) -> Generator[int]:
        """Up to `num_tokens` tokens after `prompt_ids`, as they come; it may be closed early."""
        decoder = self.decoder_for(len(prompt_ids) + num_tokens)
        start = self._reusable(prompt_ids, decoder)
        self.num_run = len(prompt_ids) - start
        self._held = []  # until prefill is through: it may be interrupted
        decoder.prefill(torch.tensor([prompt_ids[start:]]), start)
        self._held = list(prompt_ids)
        last: int | None = None
        for (token_id,) in decoder.decode(sampling, num_tokens):
            if last is not None:
                self._held.append(last)
            last = token_id
            yield token_id

    def _reusable(self, prompt_ids: Sequence[int], decoder: Decoder) -> int:
        """How many of the first tokens need not run: never all, the last makes the next."""
        common = 0
        for ours, theirs in zip(self._held, prompt_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        return common if decoder.can_rewind or common == len(self._held) else 0

    def _enlarged_for(self, num_tokens: int) -> int:
        capacity = max(self._min_capacity, self._decoder.capacity if self._decoder else 0)
        while 0 < capacity < num_tokens:
            capacity *= 2
        if self._max_capacity is not None:
            capacity = min(capacity, self._max_capacity)
        return max(capacity, num_tokens)
