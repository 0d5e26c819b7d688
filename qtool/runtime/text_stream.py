"""Tokens to text while they are made: no half characters, no text past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"  # what decoding half of a UTF-8 sequence ends in
MAX_HELD_TOKENS: Final = 8  # a character spans at most 4 bytes; more tokens than that are not one
CONTEXT_TOKENS: Final = (
    6  # of the prompt: enough for a tokenizer to know whether a space comes first
)
MAX_CUT_TOKENS: Final = 3  # what is left of a character whose first token is not there
MAX_SILENT_TOKENS: Final = 8  # without text of their own, special ones mostly


class TextStream:
    """Decodes tokens one by one and passes on each piece of text once it is final.

    A piece is held back while its last character is incomplete, and while it ends in the beginning
    of a stop string. Decoding always starts a few tokens back, since many tokenizers drop the space
    before the first token they are given.

    Args:
        tokenizer: anything with transformers' `decode`.
        prompt_ids: the tokens before; the stream continues their text.
        stop_strings: the text ends before the first of these.
        write: gets each final piece.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        write: Callable[[str], None] = lambda piece: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop for stop in stop_strings if stop)
        self._write = write
        self._window = list(prompt_ids)[-CONTEXT_TOKENS:]  # tokens that decoding starts from
        for _ in range(MAX_CUT_TOKENS):
            if self._decode(self._window).startswith(INCOMPLETE):
                del self._window[0]
        self._num_passed = len(self._window)  # of the window: their text was passed on
        self._num_spoken = len(self._window)  # of these: up to the last that had a text
        self._held = ""  # final text that may yet turn out to begin a stop string
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> None:
        """Take one more token."""
        if self.stopped:
            return
        self._window.append(token_id)
        piece = self._undecided()
        num_held = len(self._window) - self._num_passed
        if piece.endswith(INCOMPLETE) and num_held < MAX_HELD_TOKENS:
            return
        if piece:  # a special token has no text to start decoding from: keep the ones before
            self._window = self._window[self._num_passed :]
            self._num_spoken = len(self._window)
        del self._window[self._num_spoken : -MAX_SILENT_TOKENS]
        self._num_passed = len(self._window)
        self._pass_on(piece)

    def end(self) -> None:
        """Pass on whatever was held back."""
        if not self.stopped:
            self._pass_on(self._undecided())
            self._emit(self._held)
        self._held = ""

    def _undecided(self) -> str:
        """The text of the tokens since the last piece."""
        before = self._decode(self._window[: self._num_passed])
        return self._decode(self._window)[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up removes spaces before what comes later, after they were passed on.
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _pass_on(self, piece: str) -> None:
        candidate = self._held + piece
        ends = [at for stop in self._stop_strings if (at := candidate.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            self._emit(candidate[: min(ends)])
            return
        keep = max((_overlap(candidate, stop) for stop in self._stop_strings), default=0)
        self._held = candidate[len(candidate) - keep :]
        self._emit(candidate[: len(candidate) - keep])

    def _emit(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._write(piece)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
