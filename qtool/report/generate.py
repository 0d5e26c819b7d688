"""`qtool generate` in words: what a run took, and the chat on a terminal."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from qtool.defaults import MAX_SEED, PREFILL_CHUNK
from qtool.errors import Option, QtoolError, Terminated, Words, in_words
from qtool.report.output import Output
from qtool.report.units import format_bytes
from qtool.runtime.answers import Request, answer, open_history, uses_chat
from qtool.runtime.decoders.history import History
from qtool.runtime.generate import GenerateResult, PromptTooLong
from qtool.runtime.linear import LinearInt8
from qtool.runtime.loading import LoadedModel
from qtool.runtime.memory import DevicePeak
from qtool.runtime.placement import weights_by_device
from qtool.runtime.products import rounds_activations
from qtool.runtime.prompts import Conversation

PROMPT = ">>> "
LEAVE = ("/exit", "/quit", "/bye")
CLEAR = "/clear"
COMMANDS = {
    "/exit": "leave (so does Ctrl-D)",
    CLEAR: "forget what was said",
    "/help": "show this",
}
STOP_WORDS = {
    "eos": "the text ended",
    "stop_string": "stop text met",
    "interrupted": "interrupted",
}


def report_loaded(output: Output, loaded: LoadedModel) -> None:
    """With --verbose say where the weights went."""
    if not output.verbose:
        return
    places = weights_by_device(loaded.model, loaded.device).items()
    where = ", ".join(f"{format_bytes(num_bytes)} on {place}" for place, num_bytes in places)
    packed = f", {loaded.num_packed_layers} packed layers" if loaded.num_packed_layers else ""
    output.detail(f"weights: {where}{packed}")


def report_result(
    output: Output,
    loaded: LoadedModel,
    result: GenerateResult,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    seed: int | None = None,
) -> None:
    """End the streamed text, then say how fast it came, what it took and how it was chosen."""
    if not result.text.endswith("\n"):
        output.write_text("\n")
    for line in _statistics(output, loaded, result, prefill_chunk):
        output.note(line)
    output.detail(f"seconds: {_phases(loaded, result)}")
    if seed is not None:
        output.detail(f"seed {seed}")
    output.document({**_document(loaded, result), "seed": seed})


def converse(output: Output, loaded: LoadedModel, request: Request) -> None:
    """A conversation on the terminal until the user leaves.

    Without a chat template each line is continued as plain text.
    """
    chats = uses_chat(loaded, request)
    what = in_words("chat" if chats else _why_no_chat(request), output.name_option)
    output.note(
        f"{request.model} · {what} · /help for commands, Ctrl-C stops an answer, Ctrl-D leaves"
    )
    if request.sampling.seed is not None:
        output.detail(f"seed {request.sampling.seed}")
    conversation = Conversation(request.system)
    with open_history(loaded, request) as history:
        turns, way = _turns_of(request), ""
        while (text := _read_line(output)) is not None:
            command = _command_in(text)
            if command in LEAVE:
                return
            if command is not None:
                _obey(output, command, conversation if chats else None)
            elif text.strip():
                taken = _take_turn(output, loaded, next(turns), text, conversation, history)
                if taken is not None and taken != way:
                    way = taken
                    output.detail(way)


@contextmanager
def writing_answer(output: Output) -> Iterator[Callable[[str], None]]:
    """Yield what writes new text; on a terminal a clock runs until its first piece comes."""
    with ExitStack() as waiting:
        if output.has_bar:
            waiting.enter_context(output.step("reading the prompt"))

        def write(text: str) -> None:
            waiting.close()
            output.write_text(text)

        yield write


def _turns_of(request: Request) -> Iterator[Request]:
    """The request of each turn: the seed makes the whole conversation repeatable, and no two turns
    alike.
    """
    seed = request.sampling.seed
    for turn in itertools.count():
        own = None if seed is None else (seed + turn) % (MAX_SEED + 1)
        yield replace(request, sampling=replace(request.sampling, seed=own))


def _why_no_chat(request: Request) -> Words:
    if request.chat is False:
        return (Option("chat", False), ": each line is continued by itself")
    return "no chat template: each line is continued by itself"


def _command_in(text: str) -> str | None:
    """The command that a line is, or that stands before more; None for text, as paths are, which
    may begin with a space to be it.
    """
    if not text.startswith("/"):
        return None
    word, *others = text.split()
    is_command = word in (*COMMANDS, *LEAVE) or not (others or "/" in word[1:])
    return text.strip() if is_command else None


def _obey(output: Output, command: str, conversation: Conversation | None) -> None:
    """Do what a command other than those that leave says; without a chat nothing is remembered."""
    if command == CLEAR and conversation is not None:
        conversation.forget()
        output.note("forgotten")
    elif command == CLEAR:
        output.note("there is nothing to forget: each line is continued by itself")
    elif command != "/help":
        output.note(f"{command} is no command, /help shows them; a space before it makes it text")
    else:
        for name, meaning in COMMANDS.items():
            if name != CLEAR or conversation is not None:
                output.note(f"  {name:8}{meaning}")


def _take_turn(
    output: Output,
    loaded: LoadedModel,
    request: Request,
    text: str,
    conversation: Conversation,
    history: History,
) -> str | None:
    """Answer, and say how the model ran; None where it could not."""
    try:
        with writing_answer(output) as write:
            result = answer(
                loaded, request, text, write=write, conversation=conversation, history=history
            )
    except QtoolError as error:
        is_full = isinstance(error, PromptTooLong) and conversation.messages
        output.error(error.with_hint(f"{CLEAR} forgets what was said before") if is_full else error)
        return None
    output.write_text("\n")
    if isinstance(result.interruption, Terminated):  # which ends more than the answer
        raise result.interruption
    output.detail(_speed(result))
    if result.stop_reason in ("length", "interrupted"):
        is_full = result.length_limit == "context" and conversation.messages
        way_out = f"; {CLEAR} forgets what was said before" if is_full else ""
        output.note(f"({_why_it_ended(output, result)}{way_out})")
    return _way(loaded, result)


def _read_line(output: Output) -> str | None:
    """What the user types next, pasted lines as one; None at the end. Ctrl-C drops it."""
    with suppress(ImportError):
        import readline  # gives input() line editing and history

        if os.environ.get("TERM") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
    on_terminal = sys.stdout.isatty()
    while True:
        try:
            if not on_terminal:  # input() would write its prompt into the answer
                print(PROMPT, end="", file=sys.stderr, flush=True)
            return input(PROMPT if on_terminal else "")
        except Terminated:
            raise
        except KeyboardInterrupt:
            print(file=sys.stderr)
            output.note("(Ctrl-D or /exit leaves)")
        except EOFError:
            print(file=sys.stderr)
            return None


def _statistics(
    output: Output, loaded: LoadedModel, result: GenerateResult, prefill_chunk: int
) -> list[str]:
    num_at_once = min(result.prompt_tokens - result.reused_tokens, prefill_chunk)
    return [
        f"{_speed(result)} · {_why_it_ended(output, result)}",
        f"loaded in {loaded.load_s:.1f} s"
        + (f" · first token after {result.first_token_s:.1f} s" if result.first_token_s else "")
        + _memory_words(loaded.memory.device_peak()),
        f"{_way(loaded, result)}{_rounding_words(loaded, num_at_once)}",
    ]


def _way(loaded: LoadedModel, result: GenerateResult) -> str:
    """Where the model ran, and how."""
    if not result.path:  # it ended before there was one
        return loaded.devices
    return f"{loaded.devices} · {result.path}: {result.path_reason}"


def _phases(loaded: LoadedModel, result: GenerateResult) -> str:
    """What the time went to, from the start of the process."""
    phases = [
        ("loading", loaded.load_s),
        (f"{result.path} path" if result.path else "no path yet", result.prepare_s),
        ("prompt", result.prefill_s),
        ("new tokens", result.decode_s),
    ]
    if result.first_token_s is not None:
        known_s = loaded.load_s + result.prepare_s + result.prefill_s
        phases.insert(0, ("Python and packages", max(0.0, result.first_token_s - known_s)))
    return " · ".join(f"{name} {seconds:.2f}" for name, seconds in phases)


def _memory_words(peak: DevicePeak) -> str:
    if peak.basis is None:
        return ""
    without = ", the driver's own not counted" if peak.basis == "allocator" else ""
    return f" · {format_bytes(peak.num_bytes)} of GPU memory{without}"


def _int8_threshold(loaded: LoadedModel) -> float | None:
    """From which activations on columns are not rounded, where INT8 layers round the others."""
    modules = loaded.model.modules()
    return next((it.threshold for it in modules if isinstance(it, LinearInt8)), None)


def _rounding_words(loaded: LoadedModel, num_tokens: int) -> str:
    """Told where an INT8 layer rounds the activations of so many tokens at once."""
    for layer in loaded.model.modules():
        if isinstance(layer, LinearInt8):
            dtype = layer.compute_dtype or loaded.model.dtype
            x = layer.weight.new_empty((), dtype=dtype, device=loaded.device)
            x = x.expand(num_tokens, layer.in_features)  # of a shape, and no more memory
            if rounds_activations(x, layer.weight, layer.threshold):
                return f" · int8 activations of prompts, threshold {layer.threshold:g}"
    return ""


def _why_it_ended(output: Output, result: GenerateResult) -> str:
    if result.length_limit == "context":
        return f"context full: {result.prompt_tokens + len(result.token_ids):,} tokens"
    if result.length_limit == "max_new_tokens":
        return in_words((Option("max_new_tokens"), " reached"), output.name_option)
    if isinstance(result.interruption, Terminated):
        return "terminated"
    return STOP_WORDS[result.stop_reason]


def _speed(result: GenerateResult) -> str:
    prefill, decode = result.prefill_tok_s, result.decode_tok_s
    num_new = len(result.token_ids)
    known = f", {result.reused_tokens:,} in the cache" if result.reused_tokens else ""
    return (
        f"prompt {result.prompt_tokens:,} token{'s' * (result.prompt_tokens != 1)}{known}"
        + (f", {prefill:,.1f} tok/s" if prefill else "")
        + f" · new {num_new:,} token{'s' * (num_new != 1)}"
        + (f", {decode:,.1f} tok/s" if decode else "")
    )


def _document(loaded: LoadedModel, result: GenerateResult) -> dict[str, Any]:
    peak = loaded.memory.device_peak()
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
        "peak_device_bytes": peak.num_bytes,
        "peak_device_basis": peak.basis,
        "int8_threshold": _int8_threshold(loaded),
        "device": loaded.devices,
        "path": result.path or None,
        "path_reason": result.path_reason or None,
        "stop_reason": result.stop_reason,
        "length_limit": result.length_limit,
    }
