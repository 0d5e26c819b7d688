"""One request answered: a text continued, or a turn of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qtool.errors import QtoolError
from qtool.runtime.decoders.choose import DecoderOptions, refuse_path
from qtool.runtime.decoders.history import CHAT_CAPACITY, History
from qtool.runtime.generate import (
    GenerateResult,
    Limits,
    Sampling,
    context_limit,
    generate,
    room_for,
)
from qtool.runtime.loading import LoadedModel, Preview
from qtool.runtime.prompts import (
    NO_TEMPLATE,
    SAID_NO,
    Conversation,
    encode_text,
    has_chat_template,
    refuse_system,
    require_chat_template,
)
from qtool.runtime.quiet import quiet_transformers


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for: `chat` None uses the chat template where there is one.

    `decoder` says how the model is to run.
    """

    model: str
    chat: bool | None
    system: str | None
    sampling: Sampling
    limits: Limits
    decoder: DecoderOptions = field(default_factory=DecoderOptions)


def answer(
    loaded: LoadedModel,
    request: Request,
    text: str,
    *,
    write: Callable[[str], None],
    conversation: Conversation | None = None,
    history: History | None = None,
) -> GenerateResult:
    """Answer or continue `text`; `write` gets the new text as it is made.

    Args:
        conversation: what was said before; the question and its answer are added to it.
        history: what ran before, so that only what is new runs; see `open_history`.
    """
    if history is None:
        with History(loaded, request.decoder) as own:
            return answer(
                loaded, request, text, write=write, conversation=conversation, history=own
            )
    sampling, limits = request.sampling, request.limits
    if not uses_chat(loaded, request):
        with quiet_transformers():
            prompt_ids = encode_text(loaded.tokenizer, text)
        return generate(loaded, prompt_ids, sampling, limits, write=write, history=history)
    conversation = conversation or Conversation(request.system)
    conversation.ask(text)
    try:
        with quiet_transformers():
            prompt_ids = conversation.encode(loaded.tokenizer)
        result = generate(loaded, prompt_ids, sampling, limits, write=write, history=history)
    except QtoolError:
        conversation.messages.pop()  # as if it had not been asked
        raise
    conversation.answered(result.text)
    return result


def open_history(loaded: LoadedModel, request: Request) -> History:
    """For a conversation: a cache that lives across its turns and grows with it.

    Raises:
        QtoolError: usage, for a context beyond the model's.
    """
    return History(
        loaded,
        request.decoder,
        min_capacity=CHAT_CAPACITY,
        max_capacity=context_limit(loaded, request.limits.max_context),
    )


def uses_chat(loaded: LoadedModel | Preview, request: Request) -> bool:
    """Whether the request goes through the chat template.

    Raises:
        QtoolError: usage, for a chat without a template, a system message without a chat.
    """
    if request.chat:
        require_chat_template(loaded.tokenizer)
    wanted = request.chat if request.chat is not None else has_chat_template(loaded.tokenizer)
    if request.system is not None and not wanted:
        raise refuse_system(SAID_NO if request.chat is False else NO_TEMPLATE)
    return wanted


def encode_prompt(loaded: LoadedModel | Preview, request: Request, text: str) -> list[int]:
    """The tokens of `text` alone, as `answer` begins with them.

    Raises:
        QtoolError: what `uses_chat` raises, an empty prompt, a template that refuses it.
    """
    with quiet_transformers():
        if not uses_chat(loaded, request):
            return encode_text(loaded.tokenizer, text)
        conversation = Conversation(request.system)
        conversation.ask(text)
        return conversation.encode(loaded.tokenizer)


def check_request(preview: Preview, request: Request, text: str | None) -> None:
    """Refuse what cannot be answered, however long loading will take; `text` None opens a chat.

    Raises:
        QtoolError: options that do not go together or that the model cannot follow, a prompt that
            the context does not take.
    """
    refuse_path(request.decoder, preview.device, request.model)
    context_limit(preview, request.limits.max_context)
    if text is None:
        uses_chat(preview, request)
    else:
        room_for(preview, len(encode_prompt(preview, request, text)), request.limits)
