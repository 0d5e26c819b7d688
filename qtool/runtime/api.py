"""The functions of `import qtool`: models of transformers, loaded and run as the commands do."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, get_args

import torch

from qtool.defaults import (
    LEAST_TEMPERATURE,
    MAX_SEED,
    PREFILL_CHUNK,
    is_temperature,
    is_top_p,
)
from qtool.errors import Option, QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantizedPrecision
from qtool.runtime.adapters import fetch_adapter
from qtool.runtime.answers import Request, encode_prompt
from qtool.runtime.decoders.choose import DecoderOptions, PathChoice
from qtool.runtime.decoders.history import KeptHistory
from qtool.runtime.drop_in import register, unregister
from qtool.runtime.generate import Generation, Limits, Sampling, room_for
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.model_config import FLOAT_DTYPES, Int8Threshold, require_runnable
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.requirements import require_device, require_model

__all__ = ["load", "register", "release", "stream", "unregister"]

# On a model: what `load` knows of it beside the model itself, which would be a cycle; and what
# `stream` keeps for its next call.
LOADED: Final = "_qtool_loaded"
KEPT: Final = "_qtool_kept"

SEE_HELP: Final = "help(qtool.load) and help(qtool.stream) say more"
CONVERSATION: Final = (
    "a conversation goes through tokenizer.apply_chat_template and the model's own generate()"
)


def load(
    path_or_id: str | Path,
    *,
    quant: QuantizedPrecision | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    head_quant: QuantizedPrecision | None = None,
    int8_threshold: Int8Threshold | None = None,
) -> Any:
    """A model of transformers whose `generate` runs on packed weights; `model.tokenizer` is there.

        model = qtool.load("org/model", quant="nf4-dq")
        ids = model.tokenizer("Once upon a time", return_tensors="pt").to(model.device)
        print(model.tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))

    Args:
        path_or_id: a folder that `qtool quantize` or bitsandbytes wrote or a full-precision one, or
            a Hub id, with @REVISION if need be.
        quant: packs a full-precision model while it loads: nf4, nf4-dq, fp4, fp4-dq or int8.
        device: auto, cpu, cuda or cuda:N.
        dtype: what to compute in, float32, float16 or bfloat16; None goes by config.json.
        adapter: a PEFT adapter, put into the model's layers: its folder, or a Hub id, with
            @REVISION if need be.
        max_memory: spreads the weights, {0: "6GiB", "cpu": "20GiB"} or "0=6GiB,cpu=20GiB"; what is
            left over goes to disk.
        head_quant: packs the output head too, which checkpoints keep in 16 bit: faster, a little
            less exact.
        int8_threshold: where INT8 layers multiply more than 64 tokens, round the activations to
            INT8 too, but for columns with a value of at least so much; 0 rounds all, "config" takes
            the threshold of config.json (bitsandbytes' 6.0 if it has none). None rounds nothing,
            which is more exact.

    Raises:
        QtoolError: what is wrong with the checkpoint, the arguments or the memory.
    """
    _check_place("path_or_id", path_or_id)
    if adapter is not None:
        _check_place("adapter", adapter)
    if not isinstance(device, torch.device):
        _check_text("device", device)
    options = LoadOptions(
        quant=_check_quant("quant", quant),
        compute_dtype=_dtype_name(dtype),
        device=str(device),
        max_memory=_memory_limits(max_memory),
        head_quant=_check_quant("head_quant", head_quant),
        int8_threshold=_check_threshold(int8_threshold),
    )
    require_device(options.device)
    with quiet_transformers():  # before weights are downloaded for nothing
        require_runnable(require_model(str(path_or_id), options.quant), options.quant)
    if adapter is not None:  # after the arguments were checked: it may have to be downloaded
        options = replace(options, adapter=fetch_adapter(adapter))
    loaded = load_model(str(path_or_id), options)
    loaded.model.tokenizer = loaded.tokenizer
    setattr(loaded.model, LOADED, replace(loaded, model=None))
    setattr(loaded.model, KEPT, KeptHistory())
    return loaded.model


def stream(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    max_context: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    stop: str | list[str] | tuple[str, ...] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    path: PathChoice = "auto",
) -> Iterator[str]:
    """The answer to `prompt` or its continuation, piece by piece as it is made.

        for piece in qtool.stream(model, "Why is the sky blue?", max_new_tokens=64):
            print(piece, end="", flush=True)

    Closing the iterator, or leaving the loop early, ends the work. The KV cache and, on a GPU, the
    recorded graph are kept for the next call and made again only where it asks for a longer text
    or for another way to run; what was in them is not. They go with the model, or with `release`.
    Calls may overlap, in one thread or several: the later ones have caches of their own.

    Args:
        model: from `qtool.load`.
        max_context: limit of prompt and answer together; None takes the model's.
        temperature: 0 takes the most likely token, the same in each run; `top_p` and `top_k` narrow
            the choice above 0, `seed` makes it repeatable.
        chat: whether to use the chat template; None uses it where there is one.
        system: the system message of a chat.
        stop: text, or several, before which the answer ends.
        prefill_chunk: prompts run in chunks of so many tokens: fewer take less memory, more are
            faster.
        path: fused, graph or eager; auto takes the fastest that the model and the device allow, or
            what the variable QTOOL_PATH says.

    Raises:
        QtoolError: an argument out of range, a prompt longer than the context, too little memory.
    """
    loaded = _loaded(model)
    sampling = Sampling(temperature, top_p, top_k, seed)
    _check_sampling(sampling)
    _check_at_least_1("max_new_tokens", max_new_tokens)
    _check_at_least_1("prefill_chunk", prefill_chunk)
    if max_context is not None:
        _check_at_least_1("max_context", max_context)
    _check_word("path", path, get_args(PathChoice))
    if chat is not None and not isinstance(chat, bool):
        raise _usage(Option("chat", chat), "True, False or None")
    stops = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    _check_text("prompt", prompt, CONVERSATION)
    if system is not None:
        _check_text("system", system)
    for text in stops:
        _check_text("stop", text)
        if not text:
            raise _usage(Option("stop", ""), "a text, since the empty one is everywhere")
    limits = Limits(max_new_tokens, max_context, stop_strings=stops)
    request = Request("", chat, system, sampling, limits, DecoderOptions(path, prefill_chunk))
    prompt_ids = encode_prompt(loaded, request, prompt)
    room_for(loaded, len(prompt_ids), limits)  # refuses now, not with the first piece
    pieces = _pieces(loaded, prompt_ids, request)
    # At the end of the program, too: later Python takes apart the modules that ending it needs.
    weakref.finalize(pieces, _close, weakref.ref(pieces))
    return pieces


def release(model: Any) -> None:
    """Give back what `stream` keeps for the next call: the KV cache and, on a GPU, its graph.

    A text that is being made keeps its own until it ends.
    """
    _loaded(model)
    kept: KeptHistory = getattr(model, KEPT)
    setattr(model, KEPT, KeptHistory())
    kept.release()


def _check_text(name: str, value: Any, hint: str = SEE_HELP) -> None:
    if not isinstance(value, str):
        found = type(value).__name__
        raise QtoolError(f"{name}: expected text, found {found}", kind="usage", hint=hint)


def _check_place(name: str, value: Any) -> None:
    if not isinstance(value, os.PathLike):
        _check_text(name, value, "give a folder, or an id on the Hub")


def _pieces(loaded: LoadedModel, prompt_ids: list[int], request: Request) -> Generator[str]:
    kept: KeptHistory = getattr(loaded.model, KEPT)
    with kept.borrow(loaded, request.decoder) as history:
        generation = Generation(loaded, prompt_ids, request.sampling, request.limits, history)
        yield from generation.pieces()
        if rest := generation.end():
            yield rest


def _close(pieces: weakref.ref[Generator[str]]) -> None:
    """End the work on a text that is still there, but for one that a daemon thread is making."""
    unfinished = pieces()
    if unfinished is not None:
        with suppress(ValueError):  # "generator already executing"
            unfinished.close()


def _loaded(model: Any) -> LoadedModel:
    found = getattr(model, LOADED, None)
    if not isinstance(found, LoadedModel):
        raise QtoolError(
            f"expected a model from qtool.load, found a {type(model).__name__} of another origin",
            kind="usage",
            hint="use model = qtool.load(PATH_OR_ID), or the model's own generate()",
        )
    return replace(found, model=model)


def _check_quant(name: str, quant: str | None) -> QuantizedPrecision | None:
    for precision in QUANTIZED_PRECISIONS:
        if precision == quant:
            return precision
    if quant is None:
        return None
    raise _usage(Option(name, quant), f"one of {', '.join(QUANTIZED_PRECISIONS)}")


def _check_threshold(threshold: Int8Threshold | None) -> Int8Threshold | None:
    if threshold is None or threshold == "config":
        return threshold
    if not (_is_number(threshold) and 0 <= threshold < math.inf):
        raise _usage(Option("int8_threshold", threshold), '0 or more, or "config"')
    return float(threshold)


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None:
        _check_word("dtype", name, FLOAT_DTYPES)
    return name


def _memory_limits(limits: str | Mapping[int | str, int | str] | None) -> str | None:
    if limits is None or isinstance(limits, str):
        return limits
    if not isinstance(limits, Mapping):
        raise _usage(Option("max_memory", limits), 'like {0: "6GiB", "cpu": "20GiB"}')
    return ",".join(f"{place}={size}" for place, size in limits.items())


def _check_word(name: str, word: str, known: Iterable[str]) -> None:
    if word not in known:
        raise _usage(Option(name, word), f"one of {', '.join(known)}")


def _check_at_least_1(name: str, number: Any) -> None:
    if not (_is_whole(number) and number >= 1):
        raise _usage(Option(name, number), "a whole number, at least 1")


def _check_sampling(sampling: Sampling) -> None:
    temperature, top_p, seed = sampling.temperature, sampling.top_p, sampling.seed
    if not (_is_number(temperature) and is_temperature(temperature)):
        expected = f"0, or a number from {LEAST_TEMPERATURE:f} on"
        raise _usage(Option("temperature", temperature), expected)
    if top_p is not None and not (_is_number(top_p) and is_top_p(top_p)):
        raise _usage(Option("top_p", top_p), "a number above 0 and at most 1")
    if seed is not None and not (_is_whole(seed) and 0 <= seed <= MAX_SEED):
        raise _usage(Option("seed", seed), f"a whole number, 0 to {MAX_SEED}")
    if sampling.top_k is not None:
        _check_at_least_1("top_k", sampling.top_k)


def _is_whole(value: Any) -> bool:
    """Whether it counts something; True is a mistake."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _usage(found: Option, expected: str) -> QtoolError:
    return QtoolError((found, f": expected {expected}"), kind="usage", hint=SEE_HELP)
