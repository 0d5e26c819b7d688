"""`qtool generate`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.cli import options
from qtool.cli.prompt_input import read_prompt, refuse_two
from qtool.cli.session import verb_session
from qtool.cli.sizes import parse_threshold
from qtool.defaults import (
    LEAST_TEMPERATURE,
    MAX_SEED,
    PREFILL_CHUNK,
    is_temperature,
    is_top_p,
)
from qtool.errors import Option, interruption
from qtool.formats.precisions import ComputeDtype, QuantizedPrecision

if TYPE_CHECKING:
    from qtool.checkpoint.records import Checkpoint
    from qtool.report.output import Output

ANY_SEED = 1 << 32  # of those that are chosen here: short enough to be typed
SAMPLING_PANEL = "Sampling"
LOADING_PANEL = "Loading"
EXAMPLES = (
    'qtool generate ./Llama-3.1-8B-nf4 "Why is the sky blue?"',
    "qtool generate Qwen/Qwen3-8B --quant nf4-dq",
    "cat notes.txt | qtool generate ./model --system 'Sum it up.'",
    'qtool generate ./model "Once upon a time" --temperature 0.8 --seed 1',
    'qtool generate ./model "Hello" --adapter ./lora --json',
    'qtool generate ./model "Hello" --max-memory "0=6GiB,cpu=20GiB"',
)


def _check_temperature(temperature: float) -> float:
    """A callback of typer's, whose ranges let through what is no number."""
    if not is_temperature(temperature):
        raise typer.BadParameter(f"{temperature} is neither 0 nor from {LEAST_TEMPERATURE:f} on")
    return temperature


def _check_top_p(top_p: float | None) -> float | None:
    """The same for a probability."""
    if top_p is not None and not is_top_p(top_p):
        raise typer.BadParameter(f"{top_p} is not above 0 and at most 1")
    return top_p


def _check_stop(stop: list[str] | None) -> list[str] | None:
    """The same for texts: the empty one is everywhere."""
    if stop and not all(stop):
        raise typer.BadParameter("expected a text, found an empty one")
    return stop


def generate(
    ctx: typer.Context,
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="The text to answer or continue; - or nothing reads a pipe; nothing on a "
            "terminal opens a chat.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read the prompt from a file, but its last line break."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")
    ] = 256,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", callback=_check_stop, help="End before this text; repeatable."
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Limit of prompt and answer; default: the model's."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the chat template, or continue plain text; default: if there is one.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message of a chat.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T",
            callback=_check_temperature,
            rich_help_panel=SAMPLING_PANEL,
            help="0 takes the most likely token, the same in each run.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            callback=_check_top_p,
            rich_help_panel=SAMPLING_PANEL,
            help="Choose among the likeliest tokens that make up P.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, rich_help_panel=SAMPLING_PANEL, help="Choose among K tokens."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=options.seeds_to(MAX_SEED),
            rich_help_panel=SAMPLING_PANEL,
            help="Makes sampling repeatable; default: another each time, which -v and --json tell.",
        ),
    ] = None,
    quant: Annotated[
        QuantizedPrecision | None,
        typer.Option(
            rich_help_panel=LOADING_PANEL, help="Quantize a full-precision MODEL while loading."
        ),
    ] = None,
    head_quant: Annotated[
        QuantizedPrecision | None,
        typer.Option(
            rich_help_panel=LOADING_PANEL,
            help="Pack the output head too, in memory: faster, a little less exact.",
        ),
    ] = None,
    int8_threshold: Annotated[
        float | None,
        typer.Option(
            parser=parse_threshold,
            metavar="T|config",
            rich_help_panel=LOADING_PANEL,
            help="Round activations of prompts to INT8 too, as LLM.int8() does, but for columns "
            "with a value of T or more; config: the threshold that MODEL's config.json has.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID",
            rich_help_panel=LOADING_PANEL,
            help="A PEFT adapter: a local folder, or a Hub id with an optional @revision.",
        ),
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype | None,
        typer.Option(
            rich_help_panel=LOADING_PANEL, help="What to compute in; default: as the model says."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="DEVICE", rich_help_panel=LOADING_PANEL, help="auto, cpu, cuda[:N]."
        ),
    ] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="LIMITS",
            rich_help_panel=LOADING_PANEL,
            help='Spread the weights: "0=6GiB,cpu=20GiB"; what is left over goes to disk.',
        ),
    ] = None,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=LOADING_PANEL,
            help="Run prompts in chunks of N tokens: fewer take less memory, more are faster.",
        ),
    ] = PREFILL_CHUNK,
    path: Annotated[
        Literal["auto", "fused", "graph", "eager"],
        typer.Option(
            rich_help_panel=LOADING_PANEL,
            help="How to run: auto takes the fastest way that the model and the device allow.",
        ),
    ] = "auto",
    config: options.ConfigFile = None,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Run MODEL: complete a prompt, or chat.

    Text streams to stdout as it is made, statistics go to stderr. MODEL may be a folder that
    `qtool quantize` or bitsandbytes wrote, or a full-precision one.
    """
    with verb_session(
        ctx, "generate", json_output=json_output, quiet=quiet, verbose=verbose, color=color
    ) as show:
        from qtool.runtime import head_start
        from qtool.runtime.lean_imports import lean_adapters, lean_imports
        from qtool.runtime.memory_limits import require_max_memory
        from qtool.runtime.prompts import SAID_NO, refuse_system
        from qtool.runtime.requirements import (
            require_chat,
            require_context,
            require_device,
            require_model,
            require_path,
            require_run_extra,
            require_tokenizer,
        )

        refuse_two(prompt, prompt_file)
        if system is not None and chat is False:
            raise refuse_system(SAID_NO)
        _warn_of_idle(show, temperature, {"top_p": top_p, "top_k": top_k, "seed": seed}, stop or [])
        require_run_extra()
        require_device(device)
        require_path(path, device, model)
        if max_memory is not None:
            require_max_memory(max_memory, device)
        opened = require_model(model, quant)
        if path == "fused":
            _require_fusable(opened)
        require_context(opened, max_context)
        require_tokenizer(opened)
        require_chat(opened, chat=chat, system=system)
        text = read_prompt(show, prompt, prompt_file)
        folder = None if adapter is None else _fetch_adapter(show, adapter)
        head_start.begin(device, opened, compute_dtype)
        with show.importing("PyTorch", "transformers", *["PEFT"] * (folder is not None)):
            with lean_imports():
                from qtool.report.generate import (
                    converse,
                    report_loaded,
                    report_result,
                    writing_answer,
                )
                from qtool.runtime.adapters import check_adapter
                from qtool.runtime.answers import Request, answer, check_request
                from qtool.runtime.decoders.choose import DecoderOptions
                from qtool.runtime.generate import Limits, Sampling
                from qtool.runtime.loading import LoadOptions, load_model
                from qtool.runtime.model_config import require_runnable
                from qtool.runtime.quiet import quiet_transformers

            with quiet_transformers():
                require_runnable(opened, quant)
            if folder is not None:  # PEFT is imported, before the clock of loading starts
                with lean_adapters():
                    check_adapter(folder)
        limits = Limits(max_new_tokens, max_context, ignore_eos, tuple(stop or ()))
        sampling = Sampling(temperature, top_p, top_k, _seed_for(temperature, seed))
        decoder = DecoderOptions(path, prefill_chunk)
        request = Request(model, chat, system, sampling, limits, decoder)
        with show.progress() as on_event:
            options_ = LoadOptions(
                quant, compute_dtype, device, max_memory, folder, head_quant, int8_threshold
            )
            loaded = load_model(
                model,
                options_,
                on_event=on_event,
                check=lambda preview: check_request(preview, request, text),
            )
        with loaded:
            report_loaded(show, loaded)
            if text is None:
                converse(show, loaded, request)
                return
            with writing_answer(show) as write:
                result = answer(loaded, request, text, write=write)
            report_result(show, loaded, result, prefill_chunk=prefill_chunk, seed=sampling.seed)
        if result.interruption is not None:
            raise typer.Exit(interruption(result.interruption, "").exit_code)


def _seed_for(temperature: float, asked: int | None) -> int | None:
    """One that is told, so that a text that somebody likes can be had again."""
    return secrets.randbelow(ANY_SEED) if asked is None and temperature > 0 else asked


def _require_fusable(checkpoint: Checkpoint) -> None:
    """By the types that plans know without PyTorch."""
    from qtool.planner.own_runtime import FUSED_TYPES
    from qtool.runtime.requirements import require_fusable

    require_fusable(checkpoint, FUSED_TYPES)


def _fetch_adapter(show: Output, adapter: str) -> Path:
    """Its folder, once its files are known to be an adapter's."""
    from qtool.checkpoint.adapter_files import find_adapter, read_adapter_files
    from qtool.runtime.requirements import require_peft

    require_peft()
    with show.progress() as on_event:
        folder = find_adapter(adapter, on_event).folder
    read_adapter_files(folder)
    return folder


def _warn_of_idle(
    show: Output, temperature: float, idle_then: dict[str, object], stop: list[str]
) -> None:
    """What changes nothing at temperature 0, and line breaks that are none."""
    for name, value in idle_then.items():
        if temperature == 0 and value is not None:
            show.warn((Option(name), " changes nothing at ", Option("temperature", 0)))
    for text in stop:
        if "\\n" in text:
            told = " is a backslash and an n; a line break is $'\\n' in bash and zsh"
            show.warn((Option("stop", text), told))
