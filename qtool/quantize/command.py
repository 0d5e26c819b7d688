"""A `qtool quantize` request from its options to its result; `demo` makes the same request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool.backends import BackendChoice, ChosenBackend, choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.open import HubReference, locate_model
from qtool.checkpoint.records import Checkpoint
from qtool.errors import Option, QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import QuantPlan, Recipe, build_plan
from qtool.quantize.run import QuantizeResult, check_output, plan_folder, quantize_checkpoint


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What the user asked for; `num_workers` and `tile_bytes` None are the backend's choice."""

    model: str
    output: Path | None
    recipe: Recipe
    backend: BackendChoice = "auto"
    num_workers: int | None = None
    tile_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request whose checkpoint was opened and planned."""

    request: QuantizeRequest
    checkpoint: Checkpoint
    plan: QuantPlan
    chosen: ChosenBackend


def plan_request(
    request: QuantizeRequest,
    *,
    dry_run: bool = False,
    restart: bool = False,
    on_event: OnEvent = ignore_events,
) -> PlannedRequest:
    """Open MODEL (for a dry run its headers only) and plan it.

    What `run_request` would refuse about the output is refused here, too, in a dry run and before
    anything is downloaded.
    """
    if request.output is None and not dry_run:
        raise QtoolError(
            "no output folder was given",
            kind="usage",
            hint=("add -o OUT, or ", Option("dry_run"), " to see the plan only"),
        )
    if not dry_run:
        check_before_download(request.model, request.recipe, request.output, restart=restart)
    checkpoint = open_checkpoint(
        request.model,
        need="headers" if dry_run else "files",
        need_weights=True,
        on_event=on_event,
    )
    plan = build_plan(checkpoint, request.recipe)
    if dry_run and request.output is not None:
        check_output(plan_folder(checkpoint, plan), request.output, restart=restart)
    return PlannedRequest(request, checkpoint, plan, choose_backend(request.backend))


def check_before_download(
    model: str, recipe: Recipe, output: Path | None = None, *, restart: bool = False
) -> None:
    """Raise what planning a Hub model and writing it to `output` raise, by its headers, while no
    weights are here yet; write nothing.
    """
    if not isinstance(locate_model(model), HubReference):
        return
    checkpoint = open_checkpoint(model, need="headers", need_weights=True)
    plan = build_plan(checkpoint, recipe)
    if output is not None:
        check_output(plan_folder(checkpoint, plan), output, restart=restart)


def run_request(
    planned: PlannedRequest,
    *,
    allow_nonfinite: bool = False,
    restart: bool = False,
    on_event: OnEvent = ignore_events,
) -> QuantizeResult:
    """Carry the plan out."""
    request = planned.request
    if request.output is None:
        raise ValueError("the request has no output folder")
    return quantize_checkpoint(
        planned.checkpoint,
        planned.plan,
        request.output,
        planned.chosen.backend,
        PipelineSettings(request.num_workers, request.tile_bytes, allow_nonfinite),
        restart=restart,
        on_event=on_event,
    )
