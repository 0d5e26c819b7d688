"""`qtool sizing`: which models run on which GPUs?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli import planning_options as planning
from qtool.cli.estimate import check_plot_path
from qtool.cli.session import verb_session
from qtool.errors import EXIT_CODES

if TYPE_CHECKING:
    from qtool.planner.records import Sizing

EXAMPLES = (
    "qtool sizing",
    "qtool sizing --vram 11 --vram 20 --context 16384",
    "qtool sizing meta-llama/Llama-3.1-8B Qwen/Qwen3-14B",
    "qtool sizing ./my-model --gpu 4090 --gpu L40S --quant nf4-dq",
    "qtool sizing --gpu auto --json",
)


def sizing(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Local folders or Hub ids; without any, reference models from 1 to 70 billion "
            "parameters.",
            show_default=False,
        ),
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            "--quant",
            metavar="P",
            callback=planning.check_quants,
            autocompletion=lambda: list(planning.PRECISIONS),
            help=f"A precision, one of {' '.join(planning.PRECISIONS)}; repeatable.",
            show_default="nf4-dq int8; with MODEL bf16 too",
        ),
    ] = None,
    mode: planning.Mode = "generate",
    context: planning.Context = None,
    batch: planning.Batch = 1,
    gpu: planning.Gpus = None,
    gpus: planning.NumGpus = 1,
    split: planning.Split = "pipeline",
    vram: Annotated[
        list[float] | None,
        typer.Option(
            "--vram",
            min=1,
            max=1_000_000,
            metavar="GIB",
            help="Any GPU with so many GiB; repeatable.",
            show_default=False,
            rich_help_panel=planning.DEVICES_PANEL,
        ),
    ] = None,
    headroom: planning.Headroom = 0,
    plot: planning.Plot = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Show which models run on which GPUs, with what context.

    Without MODEL a guide by memory size. The speed shown is a ceiling, the GPU's memory bandwidth
    over the bytes that each token reads.
    """
    with verb_session(
        ctx, "sizing", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        if plot is not None:
            check_plot_path(plot)
        from qtool.planner.sizing import SizingRequest, size_models
        from qtool.report.sizing import report_sizing

        request = SizingRequest(
            models=tuple(models or ()),
            quants=tuple(quant or ()),
            context=context,
            workload=planning.build_workload(mode=mode, batch=batch, gpus=gpus, split=split),
            gpus=tuple(gpu or ()),
            vram_gib=tuple(vram or ()),
            headroom_percent=headroom,
        )
        with output.timing("configs, headers and plans"):
            answer = size_models(request, output.on_note)
        report_sizing(output, answer)
        if plot is not None:
            draw_bars(plot, answer)
        if request.gpus and not answer.fits_somewhere:
            raise typer.Exit(EXIT_CODES["no_fit"])


def draw_bars(path: Path, answer: Sizing) -> None:
    """Each model's memory at each precision against what the GPUs offer."""
    from qtool.report import plot

    plot.write_sizing_plot(path, answer)
