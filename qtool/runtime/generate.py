"""Text from a loaded model: greedy or sampled, token by token, with the time each part took.

    result = generate(loaded, prompt_ids, Sampling(), Limits(64), write=print)

How the model runs is a decoder's matter (`qtool.runtime.decoders`); here is what a text is: where
it ends, and when its pieces come. What the model's own generation_config says about sampling is not
used: the arguments decide alone, so temperature 0 always means the most likely token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtool.errors import Option, QtoolError
from qtool.runtime.decoders.history import History
from qtool.runtime.decoders.protocol import Decoder, Sampling
from qtool.runtime.loading import LoadedModel, Preview
from qtool.runtime.memory import out_of_memory_as_error
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.requirements import beyond_context
from qtool.runtime.text_stream import TextStream

__all__ = [
    "GenerateResult",
    "Generation",
    "LengthLimit",
    "Limits",
    "PromptTooLong",
    "Sampling",
    "StopReason",
    "context_limit",
    "generate",
    "process_age_s",
    "room_for",
]

StopReason = Literal["eos", "length", "stop_string", "interrupted"]
# What "length" means: as many tokens as were asked for, or as many as the context takes.
LengthLimit = Literal["max_new_tokens", "context"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a text ends, beside the model's own end-of-text tokens.

    `max_context` bounds prompt and new tokens together; None takes the model's own limit.
    """

    max_new_tokens: int
    max_context: int | None = None
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A text and what it took. `token_ids` are the new tokens; seconds are wall time.

    Prefill ends when the first token is known here, on the host; decode when the last one is.
    """

    text: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    prefill_s: float
    decode_s: float
    prepare_s: float  # until the decoder was there: its cache, its graph, its check
    first_token_s: float | None  # since the process started; None if there was none
    stop_reason: StopReason
    path: str
    path_reason: str
    reused_tokens: int = 0  # of the prompt, in the cache from a text before
    length_limit: LengthLimit | None = None  # None for other stop reasons than length
    interruption: KeyboardInterrupt | None = None  # for that stop reason: Ctrl-C, or `Terminated`

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens that ran, per second; None if no token came."""
        num_run = self.prompt_tokens - self.reused_tokens
        return num_run / self.prefill_s if self.token_ids else None

    @property
    def decode_tok_s(self) -> float | None:
        """New tokens per second after the first, which prefill made; None if there is only one."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s > 0 else None


def generate(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    limits: Limits,
    *,
    write: Callable[[str], None] = lambda piece: None,
    history: History | None = None,
) -> GenerateResult:
    """Continue `prompt_ids`; `write` gets the text as it is made.

    Ctrl-C or SIGTERM ends the text and is told in `stop_reason` and `interruption`.

    Args:
        history: texts before, whose common beginning with this one is not run again.

    Raises:
        QtoolError: the prompt does not fit the context, or memory runs out.
    """
    with closing(Generation(loaded, prompt_ids, sampling, limits, history)) as generation:
        with quiet_transformers():
            try:
                for piece in generation.pieces():
                    write(piece)
            except KeyboardInterrupt as signal:
                generation.interruption = signal.with_traceback(None)  # which holds the cache
        if rest := generation.end():
            write(rest)
        return generation.result()


class PromptTooLong(QtoolError):
    """The prompt alone fills the context."""


class Generation:
    """One text in the making: its `pieces`, what `end` finds held back, then the `result`.

    Raises:
        QtoolError: the prompt does not fit the context.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        limits: Limits,
        history: History | None = None,
    ) -> None:
        self.interruption: KeyboardInterrupt | None = None
        self._num_tokens = room_for(loaded, len(prompt_ids), limits)
        self._limit: LengthLimit = (
            "context" if self._num_tokens < limits.max_new_tokens else "max_new_tokens"
        )
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._eos = () if limits.ignore_eos else loaded.eos_token_ids
        self._owns_history = history is None
        self._history = history or History(loaded)
        self._written: list[str] = []  # pieces that the stream gave and nobody took yet
        self._stream = TextStream(
            loaded.tokenizer,
            prompt_ids=prompt_ids,
            stop_strings=limits.stop_strings,
            write=self._written.append,
        )
        self._clock = _TokenClock()
        self._token_ids: list[int] = []
        self._decoder: Decoder | None = None
        self._prepare_s = 0.0

    def pieces(self) -> Iterator[str]:
        """The text as it is made, up to its end; to be iterated once.

        Raises:
            QtoolError: memory runs out.
        """
        with out_of_memory_as_error("generating"):
            start_s = time.perf_counter()
            self._decoder = self._history.decoder_for(len(self._prompt_ids) + self._num_tokens)
            self._prepare_s = time.perf_counter() - start_s
            self._clock.start()
            tokens = self._history.answer(self._prompt_ids, self._sampling, self._num_tokens)
            with closing(tokens):
                for token_id in tokens:
                    self._clock.tick()
                    self._token_ids.append(token_id)
                    self._stream.add(token_id)
                    yield from self._take_written()
                    if self._stream.stopped or token_id in self._eos:
                        return

    def end(self) -> str:
        """Text that was held back, since it could have become a stop string or a character."""
        self._stream.end()
        return "".join(self._take_written())

    def result(self) -> GenerateResult:
        """What was made and what it took."""
        stop_reason = self._stop_reason()
        return GenerateResult(
            text=self._stream.text,
            prompt_tokens=len(self._prompt_ids),
            token_ids=tuple(self._token_ids),
            prefill_s=self._clock.prefill_s,
            decode_s=self._clock.decode_s,
            prepare_s=self._prepare_s,
            first_token_s=self._clock.first_token_s,
            stop_reason=stop_reason,
            path=self._decoder.path if self._decoder else "",
            path_reason=self._decoder.path_reason if self._decoder else "",
            reused_tokens=len(self._prompt_ids) - self._history.num_run if self._token_ids else 0,
            length_limit=self._limit if stop_reason == "length" else None,
            interruption=self.interruption,
        )

    def close(self) -> None:
        """Give the cache's memory back, unless it belongs to a history."""
        if self._owns_history:
            self._history.close()

    def _take_written(self) -> list[str]:
        pieces = self._written.copy()
        self._written.clear()
        return pieces

    def _stop_reason(self) -> StopReason:
        if self.interruption is not None:
            return "interrupted"
        if self._stream.stopped:
            return "stop_string"
        return "eos" if self._token_ids and self._token_ids[-1] in self._eos else "length"


class _TokenClock:
    """When prefill began, and the first and the last token came."""

    def __init__(self) -> None:
        self._start_s = self._first_s = self._last_s = 0.0
        self.first_token_s: float | None = None

    def start(self) -> None:
        """Prefill begins."""
        self._start_s = self._first_s = self._last_s = time.perf_counter()

    def tick(self) -> None:
        """A token came."""
        self._last_s = time.perf_counter()
        if self.first_token_s is None:
            self._first_s = self._last_s
            self.first_token_s = process_age_s()

    @property
    def prefill_s(self) -> float:
        """From the start to the first token."""
        return self._first_s - self._start_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self._last_s - self._first_s


def context_limit(loaded: LoadedModel | Preview, max_context: int | None) -> int | None:
    """Tokens that prompt and answer may have together; None where nothing limits them.

    Raises:
        QtoolError: more than the model was made for.
    """
    if max_context is None or loaded.max_context is None:
        return max_context or loaded.max_context
    if max_context > loaded.max_context:
        raise beyond_context(max_context, loaded.max_context)
    return max_context


def room_for(loaded: LoadedModel | Preview, num_prompt: int, limits: Limits) -> int:
    """How many tokens may be made after a prompt of `num_prompt`.

    Raises:
        PromptTooLong: none.
        QtoolError: a context beyond the model's.
    """
    context = context_limit(loaded, limits.max_context)
    if context is None:
        return limits.max_new_tokens
    if num_prompt >= context:
        raise PromptTooLong(
            f"the prompt has {num_prompt:,} tokens, the context only {context:,}",
            kind="usage",
            hint="shorten the prompt"
            if limits.max_context is None
            else ("shorten the prompt or raise ", Option("max_context")),
        )
    return min(limits.max_new_tokens, context - num_prompt)


def process_age_s() -> float:
    """Seconds since this process started, by the system's clock (10 ms steps)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks_per_s = 100  # USER_HZ, fixed on Linux
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return uptime_s - int(fields[19]) / ticks_per_s
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()
