"""Where messages begin and end in the tokens that a chat template makes of a whole conversation.

    conversation = Conversation(messages, ids, render)
    start, end = conversation.start(3), conversation.end(3)

What a template makes of the first messages alone need not be what the whole begins with: thoughts
are shown in the last turns only, end tokens may be behind the last message only. So messages are
also found by a mark: a letter is added to what one says, and the tokens behind it, which stay as
they were, tell where its text ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ASSISTANT: Final = "assistant"
MARK: Final = "x"

Message = Mapping[str, Any]
# Tokens of messages, and whether the assistant is asked to speak next; None where the template
# refuses them.
Render = Callable[[Sequence[Message], bool], list[int] | None]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and the tokens `ids` of all of them."""

    messages: Sequence[Message]
    ids: list[int]
    render: Render
    _text_ends: dict[int, int | None] = field(default_factory=dict)  # in `ids`, by message

    def start(self, place: int) -> int | None:
        """Where a message begins, behind the words that ask for it; None where it is not found."""
        if place == 0:
            return 0
        return self._reach(place, asks=self.messages[place]["role"] == ASSISTANT)

    def end(self, place: int) -> int | None:
        """Where a message ends, with its end token; None where it is not found."""
        if place == len(self.messages) - 1:
            return len(self.ids)
        return self._reach(place + 1, asks=False)

    def _reach(self, count: int, *, asks: bool) -> int | None:
        """How far the first `count` messages reach, and what asks for the next."""
        first = self.messages[:count]
        ids = self.render(first, asks)
        if ids is None:
            return None
        if self.ids[: len(ids)] == ids:
            return len(ids)
        here = self._own_text_end(count - 1)
        there = self._text_end(first, count - 1, ids, asks=asks)
        if here is None or there is None:
            return None
        return here + common_length(self.ids[here:], ids[there:])

    def _own_text_end(self, place: int) -> int | None:
        """Asked for the end of a message and for the start of the next one."""
        if place not in self._text_ends:
            self._text_ends[place] = self._text_end(self.messages, place, self.ids, asks=False)
        return self._text_ends[place]

    def _text_end(
        self, messages: Sequence[Message], place: int, ids: list[int], *, asks: bool
    ) -> int | None:
        """Where the text of a message ends in `ids`, or a place in it that is always the same."""
        for marked in _marked(messages[place]):
            other = self.render([*messages[:place], marked, *messages[place + 1 :]], asks)
            if other is not None and other != ids:
                return len(ids) - common_length(ids[::-1], other[::-1])
        return None


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with: tokens may merge where a text ends."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _marked(message: Message) -> Iterator[Message]:
    """The message with a mark in its text, or where none of that is shown, in what it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None or isinstance(content, str):
        yield {**message, "content": (content or "") + MARK}
    elif content and isinstance(content[-1], Mapping) and "text" in content[-1]:
        last = {**content[-1], "text": content[-1]["text"] + MARK}
        yield {**message, "content": [*content[:-1], last]}
    if calls:
        yield {**message, "tool_calls": [*calls[:-1], _marked_call(calls[-1])]}


def _marked_call(call: Message) -> Message:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _marked_call(function)}
    return {**call, "name": f"{call.get('name')}{MARK}"}
