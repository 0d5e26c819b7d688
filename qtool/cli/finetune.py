"""`qtool finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.cli import options
from qtool.cli import planning_options as planning
from qtool.cli.option_names import is_given
from qtool.cli.session import verb_session
from qtool.errors import Option, QtoolError
from qtool.formats.precisions import ComputeDtype, QuantizedPrecision

if TYPE_CHECKING:
    from qtool.finetune.records import FinetuneRequest
    from qtool.finetune.run import Prepared
    from qtool.report.output import Output

MAX_SEED = (1 << 32) - 1  # NumPy's
DATA_PANEL = "Data"
ADAPTER_PANEL = "Adapters"
STEPS_PANEL = "Steps"
EXAMPLES = (
    "qtool finetune Qwen/Qwen3-8B chats.jsonl -o lora",
    "qtool finetune ./Llama-3.1-8B-nf4 notes.txt -o lora --max-length 2048",
    "qtool finetune Qwen/Qwen3-8B trl-lib/Capybara -o lora --packing",
    "qtool finetune ./model rows.parquet -o lora --optimizer paged-adamw-8bit",
    "qtool finetune ./model rows.jsonl -o out --method full --optimizer adamw-8bit",
    "qtool finetune Qwen/Qwen3-8B chats.jsonl -o lora --resume",
    "accelerate launch --num_processes 2 -m qtool finetune ./model a.jsonl -o lora",
)
LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "adapter_dtype")


def finetune(
    ctx: typer.Context,
    model: options.Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl, .parquet or .txt file, or a dataset on the Hub with an optional "
            "@revision.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=options.parse_path,
            metavar="OUT",
            help="The folder to write.",
            show_default=False,
        ),
    ],
    method: Annotated[
        Literal["qlora", "lora", "full"],
        typer.Option(
            help="qlora: adapters on a packed base; lora: on a 16-bit one; full: all weights."
        ),
    ] = "qlora",
    quant: Annotated[
        QuantizedPrecision | None,
        typer.Option(
            help="What qlora packs a full-precision MODEL to while loading.",
            show_default="nf4-dq",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda[:N].")
    ] = "auto",
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=DATA_PANEL,
            help="The configuration of a Hub dataset that has several.",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=DATA_PANEL,
            help="The split of a Hub dataset, or a part of it: train[:1000].",
        ),
    ] = "train",
    text_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=DATA_PANEL,
            help="The column of plain text.",
            show_default="text",
        ),
    ] = None,
    eval_split: Annotated[
        str,
        typer.Option(
            metavar="SHARE|FILE",
            rich_help_panel=DATA_PANEL,
            help="Hold out a share of the rows, such as 0.05, or measure the loss on a file.",
            show_default=False,
        ),
    ] = "",
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=8,
            rich_help_panel=DATA_PANEL,
            help="Tokens per sequence; longer ones are cut.",
            show_default="1024, or the model's context if shorter",
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            rich_help_panel=DATA_PANEL,
            help="Put short sequences together; none sees another.",
        ),
    ] = False,
    completion_only: Annotated[
        bool,
        typer.Option(
            "--completion-only/--no-completion-only",
            rich_help_panel=DATA_PANEL,
            help="Learn completions and what the assistant says, or prompts too.",
        ),
    ] = True,
    lora_r: Annotated[
        int,
        typer.Option(
            "--lora-r", min=1, metavar="N", rich_help_panel=ADAPTER_PANEL, help="Their rank."
        ),
    ] = 16,
    lora_alpha: Annotated[
        float,
        typer.Option(
            "--lora-alpha",
            min=0,
            metavar="X",
            rich_help_panel=ADAPTER_PANEL,
            help="Their products are scaled by alpha / r.",
        ),
    ] = 32,
    lora_dropout: Annotated[
        float,
        typer.Option(
            "--lora-dropout",
            min=0,
            max=1,
            metavar="X",
            rich_help_panel=ADAPTER_PANEL,
            help="The share of their inputs that is dropped.",
        ),
    ] = 0.05,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            "--lora-targets",
            metavar="NAMES",
            rich_help_panel=ADAPTER_PANEL,
            help="Modules that get adapters, such as q_proj,v_proj.",
            show_default="all linear layers but the output head",
        ),
    ] = None,
    rslora: Annotated[
        bool,
        typer.Option("--rslora", rich_help_panel=ADAPTER_PANEL, help="Scale by alpha / sqrt(r)."),
    ] = False,
    adapter_dtype: Annotated[
        planning.AdapterDtypeName,
        typer.Option(rich_help_panel=ADAPTER_PANEL, help="What adapters are held in."),
    ] = "fp32",
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            rich_help_panel=STEPS_PANEL,
            help="Learning rate.",
            show_default="2e-4, for full 2e-5",
        ),
    ] = None,
    epochs: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0001, rich_help_panel=STEPS_PANEL, help="Times through the data."
        ),
    ] = 1.0,
    max_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, rich_help_panel=STEPS_PANEL, help="Steps, in place of epochs."
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(metavar="N", min=1, rich_help_panel=STEPS_PANEL, help="Sequences at once."),
    ] = 4,
    grad_accum: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, rich_help_panel=STEPS_PANEL, help="Batches per optimizer step."
        ),
    ] = 4,
    warmup: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            rich_help_panel=STEPS_PANEL,
            help="Steps in which the learning rate rises; below 1 a share of all.",
        ),
    ] = 0.03,
    scheduler: Annotated[
        Literal["linear", "cosine", "constant"],
        typer.Option(rich_help_panel=STEPS_PANEL, help="How the learning rate falls after it."),
    ] = "cosine",
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=STEPS_PANEL,
            help="adamw, adamw-8bit, paged-adamw-8bit, lion, sgd, adafactor, ...",
        ),
    ] = "adamw",
    weight_decay: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            rich_help_panel=STEPS_PANEL,
            help="Weights shrink by lr times X a step.",
        ),
    ] = 0.0,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            rich_help_panel=STEPS_PANEL,
            help="Recompute activations in the backward pass instead of keeping them.",
        ),
    ] = True,
    compute_dtype: Annotated[
        ComputeDtype | None,
        typer.Option(
            rich_help_panel=STEPS_PANEL,
            help="What to compute in.",
            show_default="bfloat16, or float16 on a GPU without it",
        ),
    ] = None,
    master_dtype: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(
            rich_help_panel=STEPS_PANEL,
            help="What full keeps the weights in while it trains; bf16 loses small steps.",
        ),
    ] = "fp32",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=options.seeds_to(MAX_SEED),
            rich_help_panel=STEPS_PANEL,
            help="Of adapters, dropout and the order of the data.",
        ),
    ] = 0,
    save_steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=STEPS_PANEL,
            help="Save, and measure the held-out loss, every N steps and at the end.",
        ),
    ] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT's last save, or begin.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an earlier run in OUT.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train although the plan says that it does not fit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data and show the plan; train nothing.")
    ] = False,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Fine-tune MODEL on DATA: adapters on a packed or a 16-bit base, or all weights.

    OUT becomes a PEFT adapter, or a checkpoint with `--method full`. Rows hold "text", or "prompt"
    and "completion", or "messages"; a .txt file is one running text. The plan of `qtool estimate`
    is shown first, and what cannot fit is not begun.
    """
    with verb_session(
        ctx, "finetune", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        from qtool.runtime.requirements import require_device, require_finetune_extra

        if resume and restart:
            raise QtoolError(
                (Option("resume"), " and ", Option("restart"), " contradict each other"),
                kind="usage",
                hint="give one of them",
            )
        require_finetune_extra()
        require_device(device)
        _warn_without_effect(ctx, show, method)
        from qtool.finetune.records import (
            DataOptions,
            FinetuneRequest,
            LoraOptions,
            TrainingOptions,
        )

        names = [name.strip() for name in (lora_targets or "").split(",") if name.strip()]
        is_default = not names or names == ["all-linear"]
        request = FinetuneRequest(
            model=model,
            output=output,
            method=method,
            quant=quant,
            device=device,
            resume=resume,
            restart=restart,
            force=force,
            data=DataOptions(
                source=data,
                subset=subset,
                split=split,
                text_column=text_column,
                eval_split=eval_split,
                max_length=max_length,
                packing=packing,
                completion_only=completion_only,
            ),
            lora=LoraOptions(
                r=lora_r,
                alpha=lora_alpha,
                dropout=lora_dropout,
                targets=None if is_default else tuple(names),
                rslora=rslora,
                dtype=adapter_dtype,
            ),
            training=TrainingOptions(
                lr=lr,
                epochs=epochs,
                max_steps=max_steps,
                batch=batch,
                grad_accum=grad_accum,
                warmup=warmup,
                scheduler=scheduler,
                optimizer=optimizer,
                weight_decay=weight_decay,
                seed=seed,
                save_steps=save_steps,
                gradient_checkpointing=gradient_checkpointing,
                master_dtype=master_dtype,
                compute_dtype=compute_dtype,
            ),
        )
        _run(show, request, dry_run=dry_run)


def _run(show: Output, request: FinetuneRequest, *, dry_run: bool) -> None:
    from qtool.finetune.run import is_main_process, train
    from qtool.report.finetune import report_plan, report_result, run_progress

    is_main = is_main_process()
    prepared = _prepare(show, request, speaks=is_main)
    if is_main:
        report_plan(show, prepared, dry_run=dry_run)
    if prepared.finished is not None and not dry_run:
        if is_main:
            report_result(show, prepared, prepared.finished)
        return
    prepared.planned.require_fit()
    if dry_run:
        return
    with run_progress(show, prepared) as (on_event, on_progress):
        result = train(prepared, warn=show.warn, on_event=on_event, on_progress=on_progress)
    if is_main:
        report_result(show, prepared, result)


def _prepare(show: Output, request: FinetuneRequest, *, speaks: bool) -> Prepared:
    """Of several processes one says what is wrong with the command."""
    from qtool.finetune.run import prepare

    if speaks:
        return prepare(request, warn=show.warn, on_event=show.on_note)
    try:
        return prepare(request, warn=lambda words: None)
    except QtoolError as error:
        raise typer.Exit(error.exit_code) from error


def _warn_without_effect(ctx: typer.Context, show: Output, method: str) -> None:
    for name in LORA_OPTIONS if method == "full" else ("master_dtype",):
        if is_given(ctx, name):
            show.warn((Option(name), " changes nothing with ", Option("method", method)))
