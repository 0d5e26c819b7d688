"""A `qtool quantize` request from its options to its result; `demo` makes the same request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qtool.backends import BackendChoice, ChosenBackend, choose_backend
from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.errors import QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import QuantPlan, Recipe, build_plan
from qtool.quantize.run import QuantizeResult, quantize_checkpoint
from qtool.quantize.tiles import DEFAULT_TILE_BYTES

TILE_GRAIN_BYTES = 4096  # whole pages, and whole values of every dtype


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What the user asked for; `num_workers` and `tile_bytes` None mean the defaults."""

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
    request: QuantizeRequest, *, dry_run: bool = False, on_event: OnEvent = ignore_events
) -> PlannedRequest:
    """Open MODEL (for a dry run its headers only) and plan it."""
    if request.output is None and not dry_run:
        raise QtoolError(
            "no output folder was given",
            kind="usage",
            hint="add -o OUT, or --dry-run to see the plan only",
        )
    checkpoint = open_checkpoint(
        request.model, need="headers" if dry_run else "files", on_event=on_event
    )
    return PlannedRequest(
        request, checkpoint, build_plan(checkpoint, request.recipe), choose_backend(request.backend)
    )


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
    tile_bytes = request.tile_bytes or DEFAULT_TILE_BYTES
    settings = PipelineSettings(
        num_workers=request.num_workers or num_usable_cores(),
        tile_bytes=max(1, tile_bytes // TILE_GRAIN_BYTES) * TILE_GRAIN_BYTES,
        allow_nonfinite=allow_nonfinite,
    )
    return quantize_checkpoint(
        planned.checkpoint,
        planned.plan,
        request.output,
        planned.chosen.backend,
        settings,
        restart=restart,
        on_event=on_event,
    )


def num_usable_cores() -> int:
    """Cores that this process may run on (containers and taskset included)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
