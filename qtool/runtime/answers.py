"""One request answered: a text continued, or a turn of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtool.errors import QtoolError
from qtool.runtime.generate import GenerateResult, Limits, Sampling, generate
from qtool.runtime.loading import LoadedModel
from qtool.runtime.prompts import Conversation, encode_text, has_chat_template


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for: `chat` None uses the chat template where there is one."""

    model: str
    chat: bool | None
    system: str | None
    sampling: Sampling
    limits: Limits


def answer(
    loaded: LoadedModel,
    request: Request,
    text: str,
    *,
    write: Callable[[str], None],
    conversation: Conversation | None = None,
) -> GenerateResult:
    """Answer or continue `text`; `write` gets the new text as it is made.

    Args:
        conversation: what was said before; the question and its answer are added to it.
    """
    if not uses_chat(loaded, request):
        prompt_ids = encode_text(loaded.tokenizer, text)
        return generate(loaded, prompt_ids, request.sampling, request.limits, write=write)
    conversation = conversation or Conversation(request.system)
    conversation.ask(text)
    try:
        prompt_ids = conversation.encode(loaded.tokenizer)
        result = generate(loaded, prompt_ids, request.sampling, request.limits, write=write)
    except QtoolError:
        conversation.messages.pop()  # as if it had not been asked
        raise
    conversation.answered(result.text)
    return result


def uses_chat(loaded: LoadedModel, request: Request) -> bool:
    """Whether the request goes through the chat template.

    Raises:
        QtoolError: usage, for --system without a chat.
    """
    wanted = request.chat if request.chat is not None else has_chat_template(loaded.tokenizer)
    if request.system is not None and not wanted:
        raise QtoolError(
            "--system needs a chat, but "
            + ("--no-chat was given" if request.chat is False else "there is no chat template"),
            kind="usage",
            hint="leave out --system, or put its text into the prompt",
        )
    return wanted
