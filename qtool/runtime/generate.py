"""Text from a loaded model: greedy or sampled, token by token, with the time each part took.

    result = generate(loaded, prompt_ids, Sampling(), max_new_tokens=64, write=print)

What the model's own generation_config says about sampling is not used: the arguments decide alone,
so temperature 0 always means the most likely token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qtool.errors import QtoolError
from qtool.runtime.loading import LoadedModel, quiet_transformers
from qtool.runtime.memory import out_of_memory_as_error
from qtool.runtime.text_stream import TextStream

StopReason = Literal["eos", "length", "stop_string", "interrupted"]

PATH: Final = "eager"
PACKED_REASON: Final = "packed layers are dequantized for each product"
PLAIN_REASON: Final = "no layer is packed; PyTorch runs the model as it is"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most likely one.

    `top_p` and `top_k` narrow the choice when temperature is above 0; None leaves all tokens.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


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
    """A text and what it took. `token_ids` are the new tokens; seconds are wall time."""

    text: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    prefill_s: float
    decode_s: float
    first_token_s: float | None  # since the process started; None if there was none
    stop_reason: StopReason

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens per second; None if no token came."""
        return self.prompt_tokens / self.prefill_s if self.token_ids else None

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
) -> GenerateResult:
    """Continue `prompt_ids`; `write` gets the text as it is made.

    Ctrl-C ends the text and is told in `stop_reason`.

    Raises:
        QtoolError: the prompt does not fit the context, or memory runs out.
    """
    max_new_tokens = _room_for(loaded, len(prompt_ids), limits)
    stream = TextStream(
        loaded.tokenizer, prompt_ids=prompt_ids, stop_strings=limits.stop_strings, write=write
    )
    eos = () if limits.ignore_eos else loaded.eos_token_ids
    tokens = _TokenClock(stream)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    interrupted = False
    try:
        with quiet_transformers(), out_of_memory_as_error("generating"), torch.inference_mode():
            _run(loaded, prompt_ids, _config(sampling, max_new_tokens, eos), tokens, stream)
    except KeyboardInterrupt:
        interrupted = True
    stream.end()
    return GenerateResult(
        text=stream.text,
        prompt_tokens=len(prompt_ids),
        token_ids=tuple(tokens.ids),
        prefill_s=tokens.prefill_s,
        decode_s=tokens.decode_s,
        first_token_s=tokens.first_token_s,
        stop_reason=_stop_reason(interrupted, stream, tokens.ids, eos),
    )


def path_of(loaded: LoadedModel) -> tuple[str, str]:
    """The way the model is run, and why, for the output."""
    return PATH, PACKED_REASON if loaded.num_packed_layers else PLAIN_REASON


def context_limit(loaded: LoadedModel, max_context: int | None) -> int | None:
    """Tokens that prompt and answer may have together; None where nothing limits them.

    Raises:
        QtoolError: more than the model was made for.
    """
    if max_context is None or loaded.max_context is None:
        return max_context or loaded.max_context
    if max_context > loaded.max_context:
        raise QtoolError(
            f"--max-context {max_context}: the model was made for {loaded.max_context} tokens",
            kind="usage",
            hint=f"--max-context {loaded.max_context} or less",
        )
    return max_context


def _room_for(loaded: LoadedModel, num_prompt: int, limits: Limits) -> int:
    """How many tokens may be made."""
    context = context_limit(loaded, limits.max_context)
    if context is None:
        return limits.max_new_tokens
    if num_prompt >= context:
        raise QtoolError(
            f"the prompt has {num_prompt} tokens, the context only {context}",
            kind="usage",
            hint="shorten the prompt"
            if limits.max_context is None
            else "shorten the prompt or raise --max-context",
        )
    return min(limits.max_new_tokens, context - num_prompt)


def _config(sampling: Sampling, max_new_tokens: int, eos: tuple[int, ...]) -> Any:
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # transformers' own default of top_k is 50; 0 leaves all tokens
        chosen = {"do_sample": True, "temperature": sampling.temperature}
        chosen |= {"top_p": sampling.top_p or 1.0, "top_k": sampling.top_k or 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,  # never used: one text at a time has no padding
        **chosen,
    )


def _run(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    config: Any,
    tokens: _TokenClock,
    stream: TextStream,
) -> None:
    # transformers fills what `config` leaves open from the model's own; that must add nothing.
    loaded.model.generation_config = GenerationConfig()
    input_ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    tokens.start()
    loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        streamer=tokens,
        stopping_criteria=StoppingCriteriaList([_StopOnText(stream)]),
    )


class _TokenClock(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from transformers' loop, notes when, and passes them to the text stream."""

    def __init__(self, stream: TextStream) -> None:
        self.ids: list[int] = []
        self._stream = stream
        self._start_s = self._first_s = self._last_s = 0.0
        self._saw_prompt = False
        self.first_token_s: float | None = None

    def start(self) -> None:
        """Prefill begins."""
        self._start_s = self._first_s = self._last_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first (batch, tokens), then new tokens (batch,)."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self._last_s = time.perf_counter()
        for token_id in value.reshape(-1).tolist():
            if self._stream.stopped:  # the loop may be a step ahead
                return
            if not self.ids:
                self._first_s = self._last_s
                self.first_token_s = process_age_s()
            self.ids.append(token_id)
            self._stream.add(token_id)

    def end(self) -> None:
        """The loop is over."""

    @property
    def prefill_s(self) -> float:
        """From the start to the first token."""
        return self._first_s - self._start_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self._last_s - self._first_s


class _StopOnText(StoppingCriteria):  # type: ignore[misc]
    """Ends the loop once the text stream met a stop string."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool (batch,)."""
        return torch.full((input_ids.shape[0],), self._stream.stopped, device=input_ids.device)


def _stop_reason(
    interrupted: bool, stream: TextStream, token_ids: Sequence[int], eos: tuple[int, ...]
) -> StopReason:
    if interrupted:
        return "interrupted"
    if stream.stopped:
        return "stop_string"
    return "eos" if token_ids and token_ids[-1] in eos else "length"


def process_age_s() -> float:
    """Seconds since this process started, by the system's clock (10 ms steps)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks_per_s = 100  # USER_HZ, fixed on Linux
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return uptime_s - int(fields[19]) / ticks_per_s
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()
