"""What `qtool bench generate` measures and says; plain records, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.bench.records import Engine, Limit
from qtool.errors import Option, QtoolError


@dataclass(frozen=True, slots=True)
class Size:
    """How much is generated: `batch` prompts of `prompt_tokens`, continued by `new_tokens` each."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens of one sequence in the end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def num_steps(self) -> int:
        """Steps of decoding; the first new token comes with the prompt."""
        return self.new_tokens - 1

    @property
    def text(self) -> str:
        """For people."""
        return f"batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"

    def check_context(self, longest: int | None, label: str) -> None:
        """QtoolError (usage) if it is more than the `longest` that model `label` was made for."""
        if longest is not None and self.context > longest:
            raise QtoolError(
                (
                    Option("prompt", self.prompt_tokens),
                    " and ",
                    Option("new", self.new_tokens),
                    f": {label} was made for {longest:,} tokens together",
                ),
                kind="usage",
                hint=("a smaller ", Option("prompt"), " or ", Option("new")),
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: until the first token, and from there to the last."""

    prefill_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Samples:
    """An engine's timings at one size."""

    engine: Engine
    path: str | None
    path_reason: str | None
    size: Size
    timings: tuple[Timing, ...]
    allocated_peak_bytes: int

    @property
    def prefill_s(self) -> float:
        """Mean seconds for the prompts."""
        return statistics.fmean(timing.prefill_s for timing in self.timings)

    @property
    def step_s(self) -> float:
        """Mean seconds of a step, which makes one token of each sequence."""
        decode_s = statistics.fmean(timing.decode_s for timing in self.timings)
        return decode_s / self.size.num_steps


@dataclass(frozen=True, slots=True)
class ScaledRun:
    """The speed of the whole model that a shape has few layers of.

    The steps of models with `measured_layers` layers, few and fewer, were timed; what one layer
    takes is their difference over the number of layers between, and `layers` is what the whole
    model has. `prefill_tok_s` is None where more layers took no more time.
    """

    layers: int
    measured_layers: tuple[int, int]
    prefill_tok_s: float | None
    decode_tok_s: float
    step_bytes: int
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class GenerateRun:
    """One engine with prompts of one size; tokens per second count all sequences of the batch.

    Rates are means over `n` runs, `_sd` their standard deviations, None for a single run. One step
    of decoding has to read `step_bytes`, halfway through the new tokens; `bandwidth_share` is how
    fast it reads them over how fast the device copies. `allocated_peak_bytes` is the GPU memory
    that was handed out at most, weights included; 0 on the CPU. `path` and `path_reason` are
    qtool's own.
    """

    engine: Engine
    path: str | None
    path_reason: str | None
    batch: int
    prompt_tokens: int
    new_tokens: int
    n: int
    prefill_tok_s: float
    prefill_tok_s_sd: float | None
    decode_tok_s: float
    decode_tok_s_sd: float | None
    step_bytes: int
    bandwidth_share: float
    allocated_peak_bytes: int
    scaled: ScaledRun | None = None

    @property
    def size(self) -> Size:
        """Runs of the same size are compared."""
        return Size(self.batch, self.prompt_tokens, self.new_tokens)


@dataclass(frozen=True, slots=True)
class GenerateBenchResult:
    """A whole measurement; `limit` is a copy on the same device in the same process.

    `interruption` is what ended it early, after some of its runs.
    """

    device: str
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    model: str
    quant: str
    head_quant: str | None
    limit: Limit
    runs: tuple[GenerateRun, ...]
    warnings: tuple[str, ...] = ()
    interruption: QtoolError | None = None


def decode_ratio(run: GenerateRun, runs: Sequence[GenerateRun]) -> float | None:
    """How many times as fast as `run` qtool decodes at the same size; None without such a run."""
    for other in runs:
        if other.engine == "qtool" and other.size == run.size:
            return other.decode_tok_s / run.decode_tok_s
    return None
