"""`qtool bench` and its two verbs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from qtool.backends import BackendChoice
from qtool.cli import options
from qtool.cli.session import verb_session
from qtool.formats.precisions import QuantizedPrecision

SUBVERBS = ("quantize", "kernels")
EXAMPLES = (
    "qtool bench quantize",
    "qtool bench quantize ./Llama-3.1-8B --work-dir /mnt/nvme",
    "qtool bench quantize --model-shape llama-3.1-405b-2layers --output 405b.json",
    "qtool bench kernels",
    'qtool bench kernels --op "quantize nf4" --shape 16384x53248',
    "qtool bench kernels --backend cpu --output cpu.json",
)

Backend = Annotated[BackendChoice, typer.Option(help="Where to compute.")]
OutputFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the JSON document here too."),
]


def bench() -> None:
    """Measure how near to the machine's limits qtool gets.

    The limit is measured first and again in turns with qtool and, where it is installed,
    bitsandbytes.
    """


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="What to quantize; without it, random weights of the model shape.",
            show_default=False,
        ),
    ] = None,
    model_shape: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="llama-3.1-8b, llama-3.1-405b-2layers, or the path of a config.json.",
        ),
    ] = "llama-3.1-8b",
    work_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where files are written, and removed in the end.",
            show_default="/dev/shm if it has room, else the folder for temporary files",
        ),
    ] = None,
    quant: Annotated[
        QuantizedPrecision, typer.Option(metavar="P", help="int8, fp4, fp4-dq, nf4 or nf4-dq.")
    ] = "nf4-dq",
    backend: Backend = "auto",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of each.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=options.MAX_THREADS,
            help="Workers.",
            show_default="as many as the command takes",
        ),
    ] = None,
    rival: Annotated[
        bool, typer.Option(help="Run transformers + bitsandbytes too, where installed.")
    ] = True,
    rival_repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Its runs.")] = 1,
    output: OutputFile = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure the whole command beside a raw read and write.

    Reads the source's files and writes files of the output's sizes with as many threads as qtool
    has workers, runs `qtool quantize` from the start of its process to the exit, and transformers +
    bitsandbytes on the same folder; in turns, into the same place, every output a new one.
    """
    with verb_session(
        "bench quantize", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        # A terminal that closes must not leave gigabytes behind: end as when terminated.
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
        from qtool.bench.quantize import QuantizeBenchRequest, bench_quantize
        from qtool.report.bench import check_output, report_quantize

        request = QuantizeBenchRequest(
            model=model,
            shape=model_shape,
            work_dir=work_dir,
            precision=quant,
            backend=backend,
            repeats=repeat,
            rival_repeats=rival_repeat if rival else 0,
            num_threads=threads,
        )
        check_output(output)
        with show.progress() as on_event:
            result = bench_quantize(request, on_event)
        report_quantize(show, result, output)


def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="Of the weights; repeatable.",
            show_default="28672x8192 on a GPU, else 4096x14336",
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Such as "quantize nf4-dq", or a word of it; repeatable.',
            show_default="all",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="bf16|fp16|fp32",
            autocompletion=lambda: ["bf16", "fp16", "fp32"],
            help="Of the weights; repeatable.",
            show_default="all on a GPU, else bf16",
        ),
    ] = None,
    backend: Backend = "auto",
    repeat: Annotated[
        int, typer.Option(metavar="N", min=20, help="Samples of each, at least 20.")
    ] = 20,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=options.MAX_THREADS, help="Cores to use.", show_default="all"
        ),
    ] = None,
    rival: Annotated[bool, typer.Option(help="Measure bitsandbytes too.")] = True,
    output: OutputFile = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure each kernel beside a copy of the same bytes.

    Weights are random, new in every run, and more than the caches hold. Results are compared with
    the reference before anything is timed. Times are medians.
    """
    with verb_session(
        "bench kernels", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        from qtool.bench.kernels import KernelRequest, bench_kernels
        from qtool.bench.operations import parse_dtype, parse_shape
        from qtool.report.bench import check_output, report_kernels

        request = KernelRequest(
            shapes=tuple(map(parse_shape, shape or ())),
            words=tuple(op or ()),
            dtypes=tuple(map(parse_dtype, dtype or ())),
            backend=backend,
            repeats=repeat,
            num_threads=threads,
            with_rival=rival,
        )
        check_output(output)
        with show.progress() as on_event:
            result = bench_kernels(request, on_event)
        report_kernels(show, result, output)
