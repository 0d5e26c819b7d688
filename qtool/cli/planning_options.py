"""What `estimate` and `sizing` ask about: their shared options and the workload these describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args

import typer

from qtool.cli.option_names import is_given
from qtool.cli.options import OUTPUT_PANEL
from qtool.cli.sizes import parse_threshold
from qtool.defaults import PREFILL_CHUNK
from qtool.errors import Option, Words
from qtool.formats.precisions import Precision, QuantizedPrecision

if TYPE_CHECKING:
    from qtool.planner.adapters import PlannedAdapter
    from qtool.planner.records import Workload

PRECISIONS: tuple[str, ...] = get_args(Precision)
# Formats of others: a model that is stored so can be planned as it is.
STORED_FORMATS = ("mxfp4", "nvfp4", "gptq", "awq", "compressed-tensors")
TRAINING_PANEL = "Training"
DEVICES_PANEL = "Devices"


def check_quants(quants: list[str] | None) -> list[str]:
    """The values of a repeatable --quant."""
    for quant in quants or ():
        if quant not in (*PRECISIONS, *STORED_FORMATS):
            raise typer.BadParameter(f"{quant!r} is none of {', '.join(PRECISIONS)}")
    return quants or []


ModeName = Literal["generate", "qlora", "lora", "full"]
RuntimeName = Literal["qtool", "transformers", "vllm"]
KvDtypeName = Literal["auto", "bf16", "fp8", "int8"]
SplitName = Literal["pipeline", "tensor"]
AdapterDtypeName = Literal["fp32", "bf16"]

Mode = Annotated[
    ModeName,
    typer.Option(
        help="generate: prompt and answer; qlora, lora, full: a training step with adapters on a "
        "4-bit base, on a 16-bit base, or of all weights."
    ),
]
Runtime = Annotated[
    RuntimeName,
    typer.Option(help="Whose cache, buffers and rules to plan by; transformers: + bitsandbytes."),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens per sequence, prompt included.",
        show_default="4096, or the model's if shorter",
    ),
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")]
KvDtype = Annotated[
    KvDtypeName,
    typer.Option(help="The cache's dtype; auto: what the model computes in."),
]
PrefillChunk = Annotated[
    int,
    typer.Option(
        "--prefill-chunk",
        min=1,
        metavar="N",
        help="The tokens of a prompt that qtool's own runtime runs at once.",
    ),
]
HeadQuant = Annotated[
    QuantizedPrecision | None,
    typer.Option(
        "--head-quant",
        help="Pack the output head too, in memory, as generate does; qtool's own runtime.",
        show_default="as the model has it",
    ),
]
Int8Threshold = Annotated[
    float | None,  # or "config"
    typer.Option(
        "--int8-threshold",
        parser=parse_threshold,
        metavar="T|config",
        help="Round activations of prompts to INT8 too, as generate does; qtool's own runtime.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="DIR|ID",
        help="Count a PEFT adapter too, as generate holds it: a local folder, or a Hub id with an "
        "optional @revision; qtool's own runtime.",
        show_default=False,
    ),
]
LoraR = Annotated[
    int,
    typer.Option(
        "--lora-r", min=1, metavar="N", help="Rank of the adapters.", rich_help_panel=TRAINING_PANEL
    ),
]
LoraTargets = Annotated[
    str | None,
    typer.Option(
        "--lora-targets",
        metavar="NAMES",
        help="Modules that get adapters, such as q_proj,v_proj.",
        show_default="all linear layers but the output head",
        rich_help_panel=TRAINING_PANEL,
    ),
]
LoraDropout = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        rich_help_panel=TRAINING_PANEL,
        help="The share of their inputs that is dropped.",
    ),
]
AdapterDtype = Annotated[
    AdapterDtypeName,
    typer.Option(rich_help_panel=TRAINING_PANEL, help="What adapters are held in."),
]
Optimizer = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="adamw, adamw-8bit, paged-adamw-8bit, lion, sgd, adafactor, ...",
        rich_help_panel=TRAINING_PANEL,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Recompute activations in the backward pass instead of keeping them.",
        rich_help_panel=TRAINING_PANEL,
    ),
]
Gpus = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help='A GPU to fit on, such as "4090" or "a100 80gb"; 24GB: any with so much; auto: this '
        "machine's; repeatable. Exit code 3 if nothing fits.",
        show_default=False,
        rich_help_panel=DEVICES_PANEL,
    ),
]
NumGpus = Annotated[
    int,
    typer.Option(
        "--gpus",
        min=1,
        max=1024,
        metavar="N",
        help="How many of them hold the model together.",
        rich_help_panel=DEVICES_PANEL,
    ),
]
Split = Annotated[
    SplitName,
    typer.Option(
        help="Among several GPUs: whole layers each (pipeline, device_map), or a part of every "
        "matrix (tensor).",
        rich_help_panel=DEVICES_PANEL,
    ),
]
Headroom = Annotated[
    float,
    typer.Option(
        min=0,
        max=99,
        metavar="PERCENT",
        help="Share of each GPU's memory to leave free.",
        rich_help_panel=DEVICES_PANEL,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also draw the answer to FILE.svg, .png or .html.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]


ADAPTER_OPTIONS: Final = ("lora_r", "lora_targets", "lora_dropout", "adapter_dtype")
TRAINING_OPTIONS: Final = (*ADAPTER_OPTIONS, "optimizer", "gradient_checkpointing")
OWN_OPTIONS: Final = ("prefill_chunk", "head_quant", "int8_threshold", "adapter")


def without_effect(ctx: typer.Context, workload: Workload) -> Iterator[Words]:
    """A sentence for each option that was given and that the workload has no use for."""
    mode, runtime = Option("mode", workload.mode), Option("runtime", workload.runtime)
    rules = (
        (TRAINING_OPTIONS, mode, workload.mode == "generate"),
        (ADAPTER_OPTIONS, mode, workload.mode == "full"),
        (("kv_dtype", *OWN_OPTIONS), mode, workload.mode != "generate"),
        (OWN_OPTIONS, runtime, workload.mode == "generate" and workload.runtime != "qtool"),
    )
    if workload.gpus > 1 and workload.mode != "generate" and workload.runtime == "qtool":
        spread = Option("gpus", workload.gpus)
        yield (spread, " spreads the layers, and `qtool finetune` has all of them on each GPU")
    for names, reason, applies in rules:
        for name in names:
            if applies and is_given(ctx, name):
                off = False if ctx.params[name] is False else None
                yield (Option(name, off), " changes nothing with ", reason)


def build_workload(
    *,
    mode: ModeName,
    runtime: RuntimeName = "qtool",
    batch: int,
    kv_dtype: KvDtypeName = "auto",
    gpus: int,
    split: SplitName,
    prefill_chunk: int = PREFILL_CHUNK,
    head_quant: QuantizedPrecision | None = None,
    int8_threshold: float | Literal["config"] | None = None,
    adapter: PlannedAdapter | None = None,
    lora_r: int = 16,
    lora_targets: str | None = None,
    lora_dropout: float = 0.05,
    adapter_dtype: AdapterDtypeName = "fp32",
    optimizer: str = "adamw",
    gradient_checkpointing: bool = True,
) -> Workload:
    """The workload that the options describe, its context yet to be chosen with the model."""
    from qtool.planner.records import Tuning, Workload

    names = [name.strip() for name in (lora_targets or "").split(",") if name.strip()]
    is_default = not names or names == ["all-linear"]
    return Workload(
        context=0,
        batch=batch,
        mode=mode,
        runtime=runtime,
        kv_dtype=kv_dtype,
        gpus=gpus,
        split=split,
        prefill_chunk=prefill_chunk,
        head_quant=head_quant,
        int8_threshold=int8_threshold,
        adapter=adapter,
        tuning=Tuning(
            lora_r=lora_r,
            lora_targets=None if is_default else tuple(names),
            lora_dropout=lora_dropout,
            adapter_dtype=adapter_dtype,
            optimizer=optimizer,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )
