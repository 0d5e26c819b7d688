"""The demo's questions, each put to the function that answers it for a verb."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.backends import choose_backend
from qtool.backends.cpu import num_usable_cores
from qtool.demo.speed import KernelSpeed, measure_speed
from qtool.events import OnEvent, ignore_events
from qtool.inspection.command import InspectionResult, inspect_path
from qtool.planner.estimate import EstimateRequest, estimate_model
from qtool.planner.records import Estimate, Sizing
from qtool.planner.sizing import SizingRequest, size_models
from qtool.quantize.command import (
    PlannedRequest,
    QuantizeRequest,
    plan_request,
    run_request,
)
from qtool.quantize.plan import Recipe
from qtool.quantize.run import QuantizeResult
from qtool.resources import demo_model_path

if TYPE_CHECKING:  # they import torch
    from qtool.runtime.generate import GenerateResult
    from qtool.runtime.loading import LoadedModel

PROMPT: Final = "ROMEO:"  # the model knows plays
NUM_NEW_TOKENS: Final = 60
TEMPERATURE: Final = 0.7
SEED: Final = 2
VRAM_GIB: Final = (8.0, 16.0, 24.0, 48.0, 80.0)


@dataclass(frozen=True, slots=True)
class Demo:
    """The folder of the model that ships, and the one that its quantized form goes to."""

    model: str
    output: Path

    def estimate(self) -> Estimate:
        """How much memory the model takes at each precision."""
        return estimate_model(EstimateRequest(self.model))

    def measure_speed(self) -> KernelSpeed:
        """How fast the kernels are on this machine."""
        return measure_speed(choose_backend().backend, num_usable_cores())

    def quantize(self, on_event: OnEvent = ignore_events) -> tuple[PlannedRequest, QuantizeResult]:
        """Write the model in NF4 with double quantization."""
        request = QuantizeRequest(self.model, self.output, Recipe())
        planned = plan_request(request, on_event=on_event)
        return planned, run_request(planned, on_event=on_event)

    def inspect(self, on_event: OnEvent = ignore_events) -> InspectionResult:
        """How far each layer is from the original now."""
        return inspect_path(str(self.output), against=self.model, verify=True, on_event=on_event)

    def generate(
        self, model: str, write: Callable[[str], None]
    ) -> tuple[LoadedModel, GenerateResult]:
        """What `model`, one of the two, makes of the prompt. Needs the [run] extra."""
        from qtool.runtime.answers import Request, answer
        from qtool.runtime.generate import Limits, Sampling
        from qtool.runtime.loading import LoadOptions, load_model

        sampling = Sampling(temperature=TEMPERATURE, seed=SEED)
        request = Request(model, None, None, sampling, Limits(NUM_NEW_TOKENS))
        with load_model(model, LoadOptions()) as loaded:
            result = answer(loaded, request, PROMPT, write=write)
        # The process started for the steps before; since when says nothing about this one.
        return loaded, replace(result, first_token_s=None)

    def sizing(self) -> Sizing:
        """Which models of common sizes run in which memory."""
        return size_models(SizingRequest(quants=("nf4-dq",), vram_gib=VRAM_GIB))


@contextmanager
def open_demo(keep: Path | None = None) -> Iterator[Demo]:
    """The demo, its output in `keep`, or else in a folder that goes away at the end."""
    model = str(demo_model_path())
    if keep is not None:
        yield Demo(model, keep)
        return
    with tempfile.TemporaryDirectory(prefix="qtool-demo-") as folder:
        yield Demo(model, Path(folder))
