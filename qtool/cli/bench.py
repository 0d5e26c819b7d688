"""`qtool bench` and its verbs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.backends import BackendChoice
from qtool.bench.model_shapes import SHAPE_NAMES
from qtool.cli import options
from qtool.cli.option_names import is_given
from qtool.cli.session import verb_session
from qtool.defaults import PREFILL_CHUNK
from qtool.errors import Option
from qtool.formats.precisions import Precision, QuantizedPrecision

if TYPE_CHECKING:
    from qtool.checkpoint.records import Checkpoint
    from qtool.report.output import Output

SUBVERBS = ("quantize", "kernels", "generate", "finetune", "optimizers")
EXAMPLES = (
    "qtool bench quantize",
    "qtool bench quantize ./Llama-3.1-8B --work-dir /mnt/nvme",
    "qtool bench quantize --model-shape llama-3.1-405b-2layers --output 405b.json",
    "qtool bench kernels",
    'qtool bench kernels --op "quantize nf4" --shape 16384x53248',
    "qtool bench kernels --op linear --shape 4096x14336 --rows 1 --rows 8",
    "qtool bench kernels --backend cpu --output cpu.json",
    "qtool bench generate",
    "qtool bench generate ./Llama-3.1-8B-nf4 --prompt 2048 --batch 1 --batch 8",
    "qtool bench generate --shape llama-3.1-70b-4layers --against bitsandbytes",
    "qtool bench finetune --against bitsandbytes",
    "qtool bench finetune --shape llama-3.2-1b --batch 4 --length 1024",
    "qtool bench optimizers",
    "qtool bench optimizers --case full --no-rival --output full.json",
)

Backend = Annotated[BackendChoice, typer.Option(help="Where to compute.")]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=options.parse_path,
        metavar="FILE",
        help="Write the JSON document here too.",
    ),
]


def bench() -> None:
    """Measure how near to the machine's limits qtool gets.

    The limit is measured in the same run as qtool and, where it is installed, bitsandbytes.
    """


def quantize(
    ctx: typer.Context,
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
            help=f"{SHAPE_NAMES}, or the path of a config.json.",
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
        ctx, "bench quantize", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        _warn_of_shape(ctx, show, model, "model_shape")
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
    ctx: typer.Context,
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
            help='Such as "quantize nf4-dq" or "linear nf4", or a word of it; repeatable.',
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
    rows: Annotated[
        list[int] | None,
        typer.Option(
            metavar="M",
            min=1,
            help="Tokens that a product multiplies at a time; repeatable.",
            show_default="1",
        ),
    ] = None,
    backend: Backend = "auto",
    repeat: Annotated[int, typer.Option(metavar="N", min=20, help="Samples of each.")] = 20,
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

    Products of activations and packed weights stand beside torch's own, too, and say how exact
    they are; on a GPU they are timed inside CUDA graphs.

    Weights are random, new in every run, and more than the caches hold. Results are compared with
    the reference before anything is timed. Times are medians.
    """
    with verb_session(
        ctx, "bench kernels", json_output=json_output, quiet=quiet, verbose=verbose, color=color
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
            tokens=tuple(rows or (1,)),
        )
        check_output(output)
        with show.progress() as on_event:
            result = bench_kernels(request, on_event)
        report_kernels(show, result, output)


def generate(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="What to run; without it, random weights of the shape.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{SHAPE_NAMES}, or the path of a config.json. Nothing is written; the weights "
            "are made on the device.",
            show_default="llama-3.1-8b on a GPU, else llama-3.2-1b",
        ),
    ] = None,
    quant: Annotated[
        Precision | None,
        typer.Option(
            metavar="P",
            help="bf16, fp16, fp32, int8, fp4, fp4-dq, nf4 or nf4-dq.",
            show_default="what MODEL is packed in, else nf4-dq",
        ),
    ] = None,
    head_quant: Annotated[
        Precision | None,
        typer.Option(
            metavar="P", help="Pack the output head too.", show_default="as the model has it"
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1, help="Tokens of the prompt; repeatable.", show_default="128"
        ),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Tokens to make.", show_default="256 on a GPU, else 64"
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Sequences at a time; repeatable.", show_default="1"),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Runs of each.", show_default="5 on a GPU, else 3"),
    ] = None,
    against: Annotated[
        Literal["bitsandbytes"] | None,
        typer.Option(
            help="Run transformers too, with bitsandbytes where layers are packed.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[
        Literal["auto", "fused", "graph", "eager"],
        typer.Option(help="The way that qtool runs the model."),
    ] = "auto",
    prefill_chunk: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that go through the model at a time.")
    ] = PREFILL_CHUNK,
    device: Device = "auto",
    output: OutputFile = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure how fast tokens come, beside what reading the weights would allow.

    Prompts are random, tokens the most likely ones, and none ends a text. transformers and
    bitsandbytes compute with the same bytes in the same memory, in turns with qtool. A shape with
    few of its model's layers is measured with half of them, too, which tells what the whole model
    would do.
    """
    with verb_session(
        ctx, "bench generate", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        _warn_of_shape(ctx, show, model, "shape")
        opened = _check_torch_bench(output, device, shape=shape, model=model)
        if opened is not None and new is not None:
            _check_sizes(opened, prompt or [128], new)
        with show.importing("PyTorch", "transformers"):
            from qtool.bench.generate import GenerateBenchRequest, bench_generate
            from qtool.report.bench import report_generate
            from qtool.runtime.decoders.choose import DecoderOptions
            from qtool.runtime.model_config import require_runnable
            from qtool.runtime.quiet import quiet_transformers

        if opened is not None:
            with quiet_transformers():
                require_runnable(opened)
        request = GenerateBenchRequest(
            model=model,
            shape=shape,
            precision=quant,
            head_precision=head_quant,
            prompts=tuple(prompt or (128,)),
            new_tokens=new,
            batches=tuple(batch or (1,)),
            repeats=repeat,
            against=against,
            decoding=DecoderOptions(path, prefill_chunk),
            device=device,
        )
        with show.progress() as on_event:
            result = bench_generate(request, on_event)
        report_generate(show, result, output)


def finetune(
    ctx: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{SHAPE_NAMES}, or the path of a config.json; the weights are random.",
            show_default="llama-3.1-8b on a GPU, else llama-3.2-1b",
        ),
    ] = None,
    quant: Annotated[
        QuantizedPrecision, typer.Option(metavar="P", help="int8, fp4, fp4-dq, nf4 or nf4-dq.")
    ] = "nf4-dq",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences in a step.")] = 2,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Tokens of each.", show_default="2048 on a GPU, else 64"
        ),
    ] = None,
    lora_r: Annotated[int, typer.Option(metavar="R", min=1, help="Rank of the adapters.")] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass.")
    ] = True,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of each.")] = 10,
    against: Annotated[
        Literal["bitsandbytes"] | None,
        typer.Option(help="Train with PEFT + bitsandbytes too.", show_default=False),
    ] = None,
    device: Device = "auto",
    output: OutputFile = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure a step of QLoRA, and its memory beside the plan.

    A plain loop: forward pass in bf16, loss, backward pass, AdamW with states in 8 bit. Adapters
    are on all linear layers, in fp32, with dropout 0.05. All engines train over the same packed
    bytes, on the same random tokens.
    """
    with verb_session(
        ctx, "bench finetune", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        from qtool.runtime.requirements import require_peft

        _check_torch_bench(output, device, shape=shape)
        require_peft()
        with show.importing("PyTorch", "transformers", "PEFT"):
            from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes

            with quiet_bitsandbytes():  # PEFT imports it where it is installed
                from qtool.bench.finetune import FinetuneBenchRequest, bench_finetune
                from qtool.report.bench_finetune import report_finetune

        request = FinetuneBenchRequest(
            shape=shape,
            quant=quant,
            batch=batch,
            length=length,
            lora_r=lora_r,
            steps=steps,
            gradient_checkpointing=gradient_checkpointing,
            against=against,
            device=device,
        )
        with show.progress() as on_event:
            result = bench_finetune(request, on_event)
        report_finetune(show, result, output)


def optimizers(
    ctx: typer.Context,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="lora|full",
            autocompletion=lambda: ["lora", "full"],
            help="lora: fp32 adapters of all linear layers of llama-3.1-8b; full: 15 bf16 "
            "tensors of 8192x8192; repeatable.",
            show_default="both on a GPU, else lora",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=20, help="Steps of each.")] = 20,
    rival: Annotated[bool, typer.Option(help="Measure torch and bitsandbytes too.")] = True,
    device: Device = "auto",
    output: OutputFile = None,
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure a step of each optimizer beside a copy of as many bytes.

    A step is timed from its call until the device is done, with fresh gradients and all engines in
    turns. Times are medians.
    """
    with verb_session(
        ctx, "bench optimizers", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        _check_torch_bench(output, device)
        with show.importing("PyTorch"):
            from qtool.bench.optimizers import OptimizerRequest, bench_optimizers
            from qtool.report.bench import report_optimizers

        request = OptimizerRequest(
            cases=tuple(case or ()), device=device, repeats=repeat, with_rivals=rival
        )
        with show.progress() as on_event:
            result = bench_optimizers(request, on_event)
        report_optimizers(show, result, output)


def _check_torch_bench(
    output: Path | None, device: str, *, shape: str | None = None, model: str | None = None
) -> Checkpoint | None:
    """Refuse what can be told before PyTorch is loaded; the headers of `model`, if there is one."""
    from qtool.bench.model_shapes import read_model_shape
    from qtool.report.bench import check_output
    from qtool.runtime.requirements import require_device, require_model, require_run_extra

    require_run_extra()
    check_output(output)
    require_device(device)
    if model is not None:
        return require_model(model)
    if shape is not None:
        read_model_shape(shape, option="shape")
    return None


def _check_sizes(opened: Checkpoint, prompts: list[int], new_tokens: int) -> None:
    """Refuse more tokens than MODEL was made for, where its architecture is known."""
    from qtool.bench.generate_records import Size
    from qtool.runtime.requirements import made_for

    longest = made_for(opened)
    for prompt_tokens in prompts:
        Size(1, prompt_tokens, new_tokens).check_context(longest, opened.id)


def _warn_of_shape(ctx: typer.Context, show: Output, model: str | None, name: str) -> None:
    if model is not None and is_given(ctx, name):
        show.warn((Option(name), " changes nothing with a MODEL"))
