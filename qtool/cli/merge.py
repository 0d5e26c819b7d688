"""`qtool merge`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qtool.backends import BackendChoice
from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.cli.sizes import parse_size
from qtool.errors import Option, QtoolError
from qtool.formats.precisions import ComputeDtype, QuantFormat, QuantizedPrecision

QUANT_PANEL = "With --quant"
CHECK_PANEL = "Check"
PROMPT = "The first thing to know about the sea is that it is never still, and that"
EXAMPLES = (
    "qtool merge ./adapter -o ./merged",
    "qtool merge ./adapter -o ./merged-nf4 --quant nf4-dq",
    "qtool merge org/adapter -o ./merged --onto original",
    "qtool merge ./adapter -o ./merged --base ./Llama-3.1-8B-nf4",
    'qtool merge ./adapter -o ./merged --prompt "Why is the sky blue?" --json',
)


def merge(
    ctx: typer.Context,
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="A LoRA adapter: a local folder, or a Hub id with an optional @revision.",
            show_default=False,
        ),
    ],
    output: options.OutputFolder = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model to merge into: a folder or a Hub id; default: what the adapter names.",
            show_default=False,
        ),
    ] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(
            help="Onto the packed weights that it was trained against, or the model that they were "
            "made from; default: dequantized, if the base is packed, but original if --quant packs "
            "it alike again.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help='Such as "5GB"; default: shards as the base.'
        ),
    ] = None,
    restart: options.Restart = False,
    dry_run: options.DryRun = False,
    quant: Annotated[
        QuantizedPrecision | None,
        typer.Option(
            rich_help_panel=QUANT_PANEL, help="Quantize the sum at once; default: 16 bit."
        ),
    ] = None,
    blocksize: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=options.check_blocksize,
            rich_help_panel=QUANT_PANEL,
            help="Weights that share a scale (4-bit).",
        ),
    ] = 64,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            rich_help_panel=QUANT_PANEL,
            help="Keep these modules in 16 bit too; repeatable.",
        ),
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(rich_help_panel=QUANT_PANEL, help="The dtype that readers compute in."),
    ] = "bfloat16",
    prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=CHECK_PANEL,
            help="Compare the logits for this text.",
            show_default=False,
        ),
    ] = PROMPT,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            rich_help_panel=CHECK_PANEL,
            help="Load the base with the adapter, then the merged model, and compare.",
        ),
    ] = True,
    backend: Annotated[
        BackendChoice,
        typer.Option(rich_help_panel=options.TUNING_PANEL, help="Where to quantize."),
    ] = "auto",
    threads: options.Workers = None,
    tile_size: options.TileSize = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Put a LoRA adapter into its model's weights, in bounded memory.

    Writes a plain Hugging Face folder in 16 bit, or quantized with --quant, and says how far its
    logits are from those of the model with the adapter. Run the same command again to continue
    after an interruption.
    """
    with verb_session(
        ctx, "merge", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        from qtool.merge.check import check_merge
        from qtool.merge.codes import count_changed_codes
        from qtool.merge.command import (
            MergeRequest,
            check_merge_output,
            plan_merge,
            run_merge,
        )
        from qtool.quantize.plan import Recipe
        from qtool.report.merge import report_plan, report_result

        if output is None:
            raise QtoolError(
                "no output folder was given", kind="usage", hint=("add ", Option("output", "OUT"))
            )
        recipe = quant and Recipe(
            format=QuantFormat(quant, blocksize),
            skip=tuple(skip or ()),
            compute_dtype=compute_dtype,
            max_shard_bytes=max_shard_size,
        )
        request = MergeRequest(
            adapter, output, base, onto, recipe or None, max_shard_size, backend, threads, tile_size
        )
        with show.progress() as on_event:
            planned = plan_merge(request, on_event=on_event)
            for words in planned.quant_plan.warnings() if planned.quant_plan else ():
                show.warn(words)
            if dry_run:
                check_merge_output(planned, restart=restart)
            report_plan(show, planned, dry_run=dry_run)
            if dry_run:
                return
            result = run_merge(planned, restart=restart, on_event=on_event)
            codes = count_changed_codes(planned)
            checked = check_merge(planned, prompt, on_event) if check else None
        report_result(show, planned, result, codes, checked)
