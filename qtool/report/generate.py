"""`qtool generate` in words: what a run took, and the chat on a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from qtool.errors import QtoolError
from qtool.report.output import Output
from qtool.report.units import format_bytes
from qtool.runtime.answers import Request, answer, open_history, uses_chat
from qtool.runtime.decoders.history import History
from qtool.runtime.generate import GenerateResult
from qtool.runtime.loading import LoadedModel
from qtool.runtime.prompts import Conversation

PROMPT = ">>> "
COMMANDS = {
    "/exit": "leave (so does Ctrl-D)",
    "/clear": "forget what was said",
    "/help": "show this",
}
STOP_WORDS = {
    "eos": "the text ended",
    "length": "length limit",
    "stop_string": "stop text met",
    "interrupted": "interrupted",
}


def report_result(output: Output, loaded: LoadedModel, result: GenerateResult) -> None:
    """End the streamed text, then say how fast it came and what it took."""
    if not result.text.endswith("\n"):
        output.write_text("\n")
    for line in _statistics(loaded, result):
        output.note(line)
    output.document(_document(loaded, result))


def converse(output: Output, loaded: LoadedModel, request: Request) -> None:
    """A conversation on the terminal until the user leaves.

    Without a chat template each line is continued as plain text.
    """
    chats = uses_chat(loaded, request)
    what = "chat" if chats else "no chat template: each line is continued"
    output.note(f"{request.model} · {what} · /help for commands, Ctrl-C stops an answer")
    conversation = Conversation(request.system)
    with open_history(loaded, request) as history:
        while (text := _read_line()) is not None:
            command = text.strip()
            if command in ("/exit", "/quit", "/bye"):
                return
            if command == "/clear":
                conversation.forget()
                output.note("forgotten")
            elif command.startswith("/") and " " not in command:
                for name, meaning in COMMANDS.items():
                    output.note(f"  {name:8}{meaning}")
            elif command:
                _take_turn(output, loaded, request, text, conversation, history)


def _take_turn(
    output: Output,
    loaded: LoadedModel,
    request: Request,
    text: str,
    conversation: Conversation,
    history: History,
) -> None:
    try:
        result = answer(
            loaded,
            request,
            text,
            write=output.write_text,
            conversation=conversation,
            history=history,
        )
    except QtoolError as error:
        output.error(error)
        return
    output.write_text("\n")
    output.detail(_speed(result))
    if result.stop_reason in ("length", "interrupted"):
        output.note(f"({STOP_WORDS[result.stop_reason]})")


def _read_line() -> str | None:
    """The user's next line; None when there is no more. Ctrl-C drops the line."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    on_terminal = sys.stdout.isatty()
    while True:
        try:
            if not on_terminal:  # input() would write its prompt into the answer
                print(PROMPT, end="", file=sys.stderr, flush=True)
            return input(PROMPT if on_terminal else "")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def _statistics(loaded: LoadedModel, result: GenerateResult) -> list[str]:
    memory = loaded.memory.device_peak_bytes()
    return [
        f"{_speed(result)} · {STOP_WORDS[result.stop_reason]}",
        f"loaded in {loaded.load_s:.1f} s"
        + (f" · first token after {result.first_token_s:.1f} s" if result.first_token_s else "")
        + (f" · {format_bytes(memory)} of GPU memory" if memory else ""),
        f"{loaded.devices} · {result.path}: {result.path_reason}",
    ]


def _speed(result: GenerateResult) -> str:
    prefill, decode = result.prefill_tok_s, result.decode_tok_s
    return (
        f"prompt {result.prompt_tokens} tokens"
        + (f", {prefill:,.1f} tok/s" if prefill else "")
        + f" · new {len(result.token_ids)} tokens"
        + (f", {decode:,.1f} tok/s" if decode else "")
    )


def _document(loaded: LoadedModel, result: GenerateResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "token_ids": list(result.token_ids),
        "seconds": {
            "load": loaded.load_s,
            "prefill": result.prefill_s,
            "decode": result.decode_s,
            "start_to_first_token": result.first_token_s,
        },
        "prefill_tok_s": result.prefill_tok_s,
        "decode_tok_s": result.decode_tok_s,
        "allocated_peak_bytes": loaded.memory.allocated_peak_bytes(),
        "peak_device_bytes": loaded.memory.device_peak_bytes(),
        "device": loaded.devices,
        "path": result.path,
        "path_reason": result.path_reason,
        "stop_reason": result.stop_reason,
    }
