"""`qtool estimate`: does this model fit, and how far?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli import planning_options as planning
from qtool.cli.session import verb_session
from qtool.defaults import PREFILL_CHUNK
from qtool.errors import EXIT_CODES, Option, QtoolError
from qtool.events import OnEvent

if TYPE_CHECKING:
    from qtool.planner.adapters import PlannedAdapter
    from qtool.planner.model import PlannedModel
    from qtool.planner.records import Estimate

EXAMPLES = (
    "qtool estimate meta-llama/Llama-3.1-8B",
    "qtool estimate ./my-model --gpu 4090 --gpu 'a100 80gb'",
    "qtool estimate ./my-model --quant nf4-dq --context 32768 --gpu auto",
    "qtool estimate ./my-model --adapter ./lora --gpu 4090",
    "qtool estimate ./my-model --mode qlora --batch 2 --gpu 4090",
    "qtool estimate ./my-model --runtime transformers --gpu H100 --gpus 2",
    "qtool estimate ./my-model/config.json --plot memory.html --gpu L4",
    "qtool estimate Qwen/Qwen3-8B@main --json",
)


def estimate(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A local folder (one with only a config.json too), or a Hub id with an optional "
            "@revision.",
            show_default=False,
        ),
    ],
    quant: Annotated[
        list[str] | None,
        typer.Option(
            "--quant",
            metavar="P",
            callback=planning.check_quants,
            autocompletion=lambda: list(planning.PRECISIONS),
            help=f"A precision to plan, one of {' '.join(planning.PRECISIONS)}; repeatable.",
            show_default="bf16 int8 nf4 nf4-dq, or those that suit the mode",
        ),
    ] = None,
    mode: planning.Mode = "generate",
    runtime: planning.Runtime = "qtool",
    context: planning.Context = None,
    batch: planning.Batch = 1,
    kv_dtype: planning.KvDtype = "auto",
    prefill_chunk: planning.PrefillChunk = PREFILL_CHUNK,
    head_quant: planning.HeadQuant = None,
    int8_threshold: planning.Int8Threshold = None,
    adapter: planning.Adapter = None,
    lora_r: planning.LoraR = 16,
    lora_targets: planning.LoraTargets = None,
    lora_dropout: planning.LoraDropout = 0.05,
    adapter_dtype: planning.AdapterDtype = "fp32",
    optimizer: planning.Optimizer = "adamw",
    gradient_checkpointing: planning.GradientCheckpointing = True,
    gpu: planning.Gpus = None,
    gpus: planning.NumGpus = 1,
    split: planning.Split = "pipeline",
    headroom: planning.Headroom = 0,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Also run the real transformers model under fake tensors, without a GPU, and "
            "show what it allocates (needs the extra `run`).",
        ),
    ] = False,
    plot: planning.Plot = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Plan the GPU memory of MODEL at each precision.

    Reads file headers and config.json only, never weights. Checkpoint sizes are exact: they come
    from the plan that `qtool quantize` carries out.
    """
    with verb_session(
        ctx, "estimate", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        if plot is not None:
            check_plot_path(plot)
        if exact and int8_threshold is not None:
            raise QtoolError(
                (Option("exact"), " counts products that round no activations"),
                kind="usage",
                hint=("leave out ", Option("int8_threshold")),
            )
        from qtool.checkpoint.open import open_in_background

        opening = open_in_background(model, need="headers", on_event=output.on_note)
        # Imported while the Hub is asked.
        from qtool.planner.estimate import EstimateRequest, estimate_opened
        from qtool.planner.gpus import resolve_gpus
        from qtool.planner.model import describe_model
        from qtool.report.estimate import report_estimate

        output.prepare()
        planned_adapter = None
        if adapter is not None and mode == "generate" and runtime == "qtool":
            planned_adapter = plan_adapter(adapter, output.on_note)
        request = EstimateRequest(
            model=model,
            quants=tuple(quant or ()),
            context=context,
            workload=planning.build_workload(
                mode=mode,
                runtime=runtime,
                batch=batch,
                kv_dtype=kv_dtype,
                gpus=gpus,
                split=split,
                prefill_chunk=prefill_chunk,
                head_quant=head_quant,
                int8_threshold=int8_threshold,
                adapter=planned_adapter,
                lora_r=lora_r,
                lora_targets=lora_targets,
                lora_dropout=lora_dropout,
                adapter_dtype=adapter_dtype,
                optimizer=optimizer,
                gradient_checkpointing=gradient_checkpointing,
            ),
            headroom_percent=headroom,
        )
        devices = resolve_gpus(gpu or ())
        for words in planning.without_effect(ctx, request.workload):
            output.warn(words)
        if headroom and not devices:
            output.warn((Option("headroom"), " changes nothing without ", Option("gpu")))
        with output.timing("config and headers"):
            opened = describe_model(opening())
        with output.timing("plans"):
            answer = estimate_opened(opened, devices, request)
        is_rounding = any(plan.int8_threshold is not None for plan in answer.plans)
        if int8_threshold is not None and request.workload.is_own and not is_rounding:
            why = " changes nothing: no plan has INT8 layers that compute in 16 bit"
            output.warn((Option("int8_threshold"), why))
        if exact:
            from qtool.exact.beside_plans import run_plans

            answer = run_plans(opened, answer)
        report_estimate(output, answer)
        if plot is not None:
            draw_curves(plot, opened, answer)
        if answer.gpus and not answer.fits_somewhere:
            raise typer.Exit(EXIT_CODES["no_fit"])


def plan_adapter(adapter: str, on_event: OnEvent) -> PlannedAdapter:
    """What is known of the adapter from its config and header; of a Hub id they are read there."""
    from qtool.checkpoint.adapter_files import read_adapter
    from qtool.planner.adapters import PlannedAdapter

    return PlannedAdapter.of(adapter, read_adapter(adapter, on_event))


def check_plot_path(path: Path) -> None:
    """Object to a file that cannot be drawn before any work is done."""
    from qtool.report import plot

    plot.check_plot_path(path)


def draw_curves(path: Path, model: PlannedModel, answer: Estimate) -> None:
    """Memory against context, for each precision."""
    from qtool.planner.curves import context_curves
    from qtool.report import plot

    plot.write_plot(path, context_curves(model, answer))
