"""A decoder that lives across prompts: tokens that its cache holds already are not run again.

with History(loaded, min_capacity=4096) as history:
    for token_id in history.answer(prompt_ids, Sampling(), num_tokens=256): ...
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Final, Self

import torch

from qtool.errors import QtoolError
from qtool.runtime.adapters import is_peft_layer
from qtool.runtime.decoders.choose import DecoderOptions, asked_path, choose_decoder
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

    def forget(self) -> None:
        """The next text runs from its first token, whatever the cache holds."""
        self._held = []

    def decoder_for(self, num_tokens: int) -> Decoder:
        """The decoder, made or made larger if it has not room for `num_tokens`.

        Raises:
            QtoolError: its cache does not fit.
        """
        if self._decoder is None or self._decoder.capacity < num_tokens:
            capacity = self._enlarged_for(num_tokens)
            self.close()  # first: both may not fit
            self._decoder = self._make(capacity, num_tokens)
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

    def _make(self, capacity: int, num_tokens: int) -> Decoder:
        """With room for later texts too, if that much memory is free."""
        try:
            return choose_decoder(self._loaded, capacity, options=self._options)
        except QtoolError as error:
            if error.kind != "memory" or capacity <= num_tokens:
                raise
        return choose_decoder(self._loaded, num_tokens, options=self._options)

    def _enlarged_for(self, num_tokens: int) -> int:
        capacity = max(self._min_capacity, self._decoder.capacity if self._decoder else 0)
        while 0 < capacity < num_tokens:
            capacity *= 2
        if self._max_capacity is not None:
            capacity = min(capacity, self._max_capacity)
        return max(capacity, num_tokens)


class KeptHistory:
    """What a model keeps between independent texts: a decoder, with its cache and its graph.

    One text at a time borrows it, in whatever thread and on whatever stream; others meanwhile have
    decoders of their own. It refers to the model weakly, so that both go when the model goes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._history: History | None = None
        self._made_for: tuple[object, ...] = ()
        self._last_work: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # a copy of the model has a decoder of its own

    @contextmanager
    def borrow(self, loaded: LoadedModel, options: DecoderOptions) -> Iterator[History]:
        """A history that remembers nothing, so that the same text comes out as the first time."""
        if not self._lock.acquire(blocking=False):
            with History(loaded, options) as own:
                yield own
            return
        try:
            with self._behind_the_last(loaded.device):
                history = self._renewed(loaded, options)
                history.forget()
                yield history
        except Exception:
            self._close()  # whatever state it is in
            raise
        finally:
            self._lock.release()

    def release(self) -> None:
        """Give the memory back, unless a text borrows it just now."""
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    @contextmanager
    def _behind_the_last(self, device: torch.device) -> Iterator[None]:
        """On a GPU: a text that was broken off leaves steps on its stream, which still write the
        cache. The current stream waits for them, the host does not.

        A text may be closed where another stream is the current one, or in another thread.
        """
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._last_work is not None:
            stream.wait_event(self._last_work)
        try:
            yield
        finally:
            self._last_work = stream.record_event()

    def _renewed(self, loaded: LoadedModel, options: DecoderOptions) -> History:
        """The one that is there, if it was made for the same and nothing moved since."""
        state = _places(loaded.model), _contents(loaded.model)
        made_for = (weakref.ref(loaded.model), asked_path(options), options, *state)
        if self._history is None or made_for != self._made_for:
            self._close()
            self._history = History(replace(loaded, model=weakref.proxy(loaded.model)), options)
            self._made_for = made_for
        return self._history

    def _close(self) -> None:
        history, last_work = self._history, self._last_work
        self._history, self._made_for, self._last_work = None, (), None
        if last_work is not None:
            last_work.synchronize()  # the memory may be used at once, on another stream
        if history is not None:
            history.close()


def _places(model: Any) -> tuple[int, ...]:
    """Which modules there are and where their tensors lie: a recorded step takes it for granted."""
    tensors = chain(model.parameters(), model.buffers())
    return (*map(id, model.modules()), *(tensor.data_ptr() for tensor in tensors))


def _contents(model: Any) -> tuple[object, ...]:
    """How often parameters were written, and which adapters are on: a step has copies of them."""
    parameters = (it for it in model.parameters() if not it.is_inference())
    return (*(it._version for it in parameters), *map(_switches, model.modules()))


def _switches(module: Any) -> tuple[object, ...]:
    if not is_peft_layer(module):
        return ()
    scales = getattr(module, "scaling", {})
    merged = getattr(module, "merged", False)
    return module.disable_adapters, merged, *module.active_adapters, *scales.items()
