"""`qtool estimate`: does this model fit, and how far?"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.errors import EXIT_CODES
from qtool.formats.precisions import QUANTIZED_PRECISIONS

EXAMPLES = (
    "qtool estimate meta-llama/Llama-3.1-8B",
    "qtool estimate ./my-model --gpu 4090 --gpu 'a100 80gb'",
    "qtool estimate ./my-model --quant nf4-dq --context 32768 --gpu auto",
    "qtool estimate ./my-model/config.json --batch 8 --headroom 10 --gpu L4",
    "qtool estimate Qwen/Qwen3-8B@main --json",
)

PRECISIONS = ("fp32", "bf16", "fp16", *QUANTIZED_PRECISIONS)


def check_quants(quants: list[str] | None) -> list[str]:
    """The values of a repeatable --quant."""
    for quant in quants or ():
        if quant not in PRECISIONS:
            raise typer.BadParameter(f"{quant!r} is none of {', '.join(PRECISIONS)}")
    return quants or []


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
Gpus = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help='A GPU to fit on, such as "4090" or "a100 80gb"; auto: this machine\'s; repeatable. '
        "Exit code 3 if nothing fits.",
        show_default=False,
    ),
]
Headroom = Annotated[
    float,
    typer.Option(
        min=0, max=99, metavar="PERCENT", help="Share of each GPU's memory to leave free."
    ),
]


def estimate(
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
            callback=check_quants,
            autocompletion=lambda: list(PRECISIONS),
            help=f"A precision to plan, one of {' '.join(PRECISIONS)}; repeatable.",
            show_default="bf16 int8 nf4 nf4-dq",
        ),
    ] = None,
    context: Context = None,
    batch: Batch = 1,
    kv_dtype: Annotated[
        Literal["auto", "bf16"],
        typer.Option(help="The cache's dtype; auto: what the model computes in."),
    ] = "auto",
    gpu: Gpus = None,
    headroom: Headroom = 0,
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
        "estimate", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as output:
        from qtool.planner import EstimateRequest, estimate_model
        from qtool.report.estimate import report_estimate

        request = EstimateRequest(
            model=model,
            quants=tuple(quant or ()),
            context=context,
            batch=batch,
            kv_dtype=kv_dtype,
            gpus=tuple(gpu or ()),
            headroom_percent=headroom,
        )
        answer = estimate_model(request, output.on_note)
        report_estimate(output, answer)
        if answer.gpus and not answer.fits_somewhere:
            raise typer.Exit(EXIT_CODES["no_fit"])
