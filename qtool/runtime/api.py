"""The functions of `import qtool`: models of transformers, loaded and run as the commands do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from qtool.errors import QtoolError
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantizedPrecision
from qtool.runtime.answers import Request, uses_chat
from qtool.runtime.drop_in import register, unregister
from qtool.runtime.generate import Generation, Limits, Sampling
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.model_config import FLOAT_DTYPES
from qtool.runtime.prompts import Conversation, encode_text

__all__ = ["load", "register", "stream", "unregister"]

# On a model: what `load` knows of it beside the model itself, which would be a cycle.
LOADED: Final = "_qtool_loaded"


def load(
    path_or_id: str | Path,
    *,
    quant: QuantizedPrecision | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
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
        adapter: the folder of a PEFT adapter, put into the model's layers.
        max_memory: spreads the weights, {0: "6GiB", "cpu": "20GiB"} or "0=6GiB,cpu=20GiB"; what is
            left over goes to disk.

    Raises:
        QtoolError: what is wrong with the checkpoint, the arguments or the memory.
    """
    options = LoadOptions(
        quant=_check_quant(quant),
        compute_dtype=_dtype_name(dtype),
        device=str(device),
        max_memory=_memory_limits(max_memory),
        adapter=None if adapter is None else Path(adapter),
    )
    loaded = load_model(str(path_or_id), options)
    loaded.model.tokenizer = loaded.tokenizer
    setattr(loaded.model, LOADED, replace(loaded, model=None))
    return loaded.model


def stream(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """The answer to `prompt` or its continuation, piece by piece as it is made.

        for piece in qtool.stream(model, "Why is the sky blue?", max_new_tokens=64):
            print(piece, end="", flush=True)

    Closing the iterator, or leaving the loop early, ends the work. Each call has a KV cache of its
    own, which goes with it.

    Args:
        model: from `qtool.load`.
        temperature: 0 takes the most likely token, always the same; `top_p` and `top_k` narrow the
            choice above 0, `seed` makes it repeatable.
        chat: whether to use the chat template; None uses it where there is one.
        system: the system message of a chat.
        stop: text, or several, before which the answer ends.

    Raises:
        QtoolError: an argument out of range, a prompt longer than the context, too little memory.
    """
    loaded = _loaded(model)
    sampling = Sampling(temperature, top_p, top_k, seed)
    _check_numbers(sampling, max_new_tokens)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    request = Request("", chat, system, sampling, Limits(max_new_tokens, stop_strings=stops))
    prompt_ids = _encode(loaded, request, prompt)
    return _pieces(Generation(loaded, prompt_ids, sampling, request.limits))


def _encode(loaded: LoadedModel, request: Request, prompt: str) -> list[int]:
    if not uses_chat(loaded, request):
        return encode_text(loaded.tokenizer, prompt)
    conversation = Conversation(request.system)
    conversation.ask(prompt)
    return conversation.encode(loaded.tokenizer)


def _pieces(generation: Generation) -> Iterator[str]:
    with closing(generation):
        yield from generation.pieces()
        if rest := generation.end():
            yield rest


def _loaded(model: Any) -> LoadedModel:
    found = getattr(model, LOADED, None)
    if not isinstance(found, LoadedModel):
        raise QtoolError(
            f"stream() was given a {type(model).__name__} that qtool.load did not make",
            kind="usage",
            hint="use model = qtool.load(PATH_OR_ID), or the model's own generate()",
        )
    return replace(found, model=model)


def _check_quant(quant: str | None) -> QuantizedPrecision | None:
    for precision in QUANTIZED_PRECISIONS:
        if precision == quant:
            return precision
    if quant is None:
        return None
    raise _usage(f"quant={quant!r}", f"one of {', '.join(QUANTIZED_PRECISIONS)}")


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in FLOAT_DTYPES:
        raise _usage(f"dtype={dtype!r}", f"one of {', '.join(FLOAT_DTYPES)}")
    return name


def _memory_limits(limits: str | Mapping[int | str, int | str] | None) -> str | None:
    if limits is None or isinstance(limits, str):
        return limits
    return ",".join(f"{place}={size}" for place, size in limits.items())


def _check_numbers(sampling: Sampling, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise _usage(f"max_new_tokens={max_new_tokens}", "at least 1")
    if sampling.temperature < 0:
        raise _usage(f"temperature={sampling.temperature}", "0 or above")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise _usage(f"top_p={sampling.top_p}", "above 0 and at most 1")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise _usage(f"top_k={sampling.top_k}", "at least 1")


def _usage(found: str, expected: str) -> QtoolError:
    return QtoolError(f"{found}: expected {expected}", kind="usage", hint="help(qtool) shows more")
