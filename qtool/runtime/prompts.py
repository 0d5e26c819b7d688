"""Prompts to tokens: plain text, or a conversation through the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from qtool.errors import Option, QtoolError, Words

SAID_NO: Final = (Option("chat", False), " was given")
NO_TEMPLATE: Final = "there is no chat template"


def has_chat_template(tokenizer: Any) -> bool:
    """Whether conversations can be put into the model's own form."""
    return bool(getattr(tokenizer, "chat_template", None))


def require_chat_template(tokenizer: Any) -> None:
    """QtoolError if conversations cannot be."""
    if not has_chat_template(tokenizer):
        raise no_chat_template()


def no_chat_template() -> QtoolError:
    """The error for a chat that was asked for where there is no template."""
    return QtoolError(
        "the tokenizer has no chat template",
        kind="usage",
        hint=(
            "leave out ",
            Option("chat"),
            " and ",
            Option("system"),
            ", and give the text to continue",
        ),
    )


def refuse_system(why: Words) -> QtoolError:
    """The error for a system message where there is no chat, and why there is none."""
    parts = why if isinstance(why, tuple) else (why,)
    return QtoolError(
        (Option("system"), " needs a chat, but ", *parts),
        kind="usage",
        hint=("leave out ", Option("system"), ", or put its text into the prompt"),
    )


def check_text(text: str, what: str = "the prompt") -> None:
    """QtoolError for bytes that were no text: the command line and pipes let them through."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QtoolError(
            f"{what} is not UTF-8 at byte {len(text[: error.start].encode('utf-8'))}",
            kind="usage",
            hint="convert it to UTF-8",
        ) from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of plain text, with the special tokens that the tokenizer puts first.

    Raises:
        QtoolError: no text, or none that UTF-8 can have.
    """
    check_text(text)
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise QtoolError(
            "the prompt is empty", kind="usage", hint="give a text to answer or to continue"
        )
    return ids


@dataclass(slots=True)
class Conversation:
    """Messages so far, oldest first."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_text(self.system or "", "the system message")

    def ask(self, text: str) -> None:
        """The user says something; QtoolError if it is no text."""
        check_text(text)
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """The model said something."""
        self.messages.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Start again; the system message stays."""
        self.messages.clear()

    def encode(self, tokenizer: Any) -> list[int]:
        """Tokens of the whole conversation, up to where the model answers.

        Raises:
            QtoolError: there is no template, or it refuses these messages.
        """
        require_chat_template(tokenizer)
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            encoded = tokenizer.apply_chat_template(
                system + self.messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program; it may raise anything
            raise QtoolError(
                f"the chat template refuses this conversation: {error}",
                kind="unsupported",
                hint=(
                    "some templates take no ",
                    Option("system"),
                    " message; ",
                    Option("chat", False),
                    " continues plain text",
                ),
            ) from error
        ids: list[int] = encoded["input_ids"]
        return ids
