"""`qtool quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.backends import BackendChoice
from qtool.backends.cuda_driver import open_in_background
from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.cli.sizes import parse_size
from qtool.formats.precisions import ComputeDtype, QuantFormat, QuantizedPrecision, QuantStorage

EXAMPLES = (
    "qtool quantize ./Llama-3.1-8B -o ./Llama-3.1-8B-nf4",
    "qtool quantize Qwen/Qwen3-8B -o out --quant int8",
    "qtool quantize ./model --dry-run",
    "qtool quantize ./model -o out --blocksize 128 --skip model.layers.0",
    "qtool quantize ./model -o out --config nf4-dq --json",
)


def quantize(
    ctx: typer.Context,
    model: options.Model,
    output: options.OutputFolder = None,
    quant: Annotated[QuantizedPrecision, typer.Option(help="The precision.")] = "nf4-dq",
    blocksize: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=options.check_blocksize,
            help="Weights that share a scale (4-bit).",
        ),
    ] = 64,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Keep these modules in 16 bit too; repeatable."),
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(help="The dtype that readers compute in."),
    ] = "bfloat16",
    quant_storage: Annotated[
        QuantStorage, typer.Option(help="The dtype that packed bytes are labelled with.")
    ] = "uint8",
    int8_threshold: Annotated[
        float, typer.Option(metavar="T", min=0, help="Outlier threshold for LLM.int8() readers.")
    ] = 6.0,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help='Such as "5GB"; default: shards as the source.'
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Quantize NaN and Inf instead of refusing.")
    ] = False,
    dry_run: options.DryRun = False,
    restart: options.Restart = False,
    backend: Annotated[
        BackendChoice, typer.Option(rich_help_panel=options.TUNING_PANEL, help="Where to compute.")
    ] = "auto",
    threads: options.Workers = None,
    tile_size: options.TileSize = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Write MODEL in 4 or 8 bit, in bounded memory.

    The output is a plain Hugging Face folder in the bitsandbytes layout. Run the same command again
    to continue after an interruption.
    """
    with verb_session(
        ctx, "quantize", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        if backend != "cpu" and not dry_run:
            open_in_background()
        from qtool.quantize.command import (
            QuantizeRequest,
            plan_request,
            run_request,
        )
        from qtool.quantize.plan import Recipe
        from qtool.report.quantize import report_plan, report_result, warn_of_plan

        recipe = Recipe(
            format=QuantFormat(quant, blocksize, quant_storage),
            skip=tuple(skip or ()),
            compute_dtype=compute_dtype,
            int8_threshold=int8_threshold,
            max_shard_bytes=max_shard_size,
        )
        request = QuantizeRequest(model, output, recipe, backend, threads, tile_size)
        planned = plan_request(request, dry_run=dry_run, restart=restart, on_event=show.on_note)
        warn_of_plan(show, planned)
        report_plan(show, planned, dry_run=dry_run)
        if not dry_run:
            with show.progress() as on_event:
                result = run_request(
                    planned,
                    allow_nonfinite=allow_nonfinite,
                    restart=restart,
                    on_event=on_event,
                )
            report_result(show, planned, result)
