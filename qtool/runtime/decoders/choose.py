"""Which way a loaded model runs, and why.

The fastest way that can be taken is taken; what each faster one said against it is the reason
that is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal, get_args

import torch

from qtool.defaults import PREFILL_CHUNK
from qtool.errors import Option, QtoolError
from qtool.runtime.decoders.caches import CAPACITY_STEP, fixed_cache
from qtool.runtime.decoders.capture import CaptureFailed
from qtool.runtime.decoders.eager import EagerDecoder
from qtool.runtime.decoders.graphed import GraphDecoder
from qtool.runtime.decoders.network import Network
from qtool.runtime.decoders.protocol import Decoder, Path
from qtool.runtime.loading import LoadedModel
from qtool.runtime.requirements import NO_CUPY, NO_GPU, cannot_take

PathChoice = Literal["auto", "fused", "graph", "eager"]
PATH_VARIABLE: Final = "QTOOL_PATH"
SPREAD: Final = "the weights are spread over several devices"


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """How to run: `path` auto takes the fastest, or what the environment's QTOOL_PATH says.

    Prompts go through the model in chunks of at most `prefill_chunk` tokens.
    """

    path: PathChoice = "auto"
    prefill_chunk: int = PREFILL_CHUNK


@dataclass(frozen=True, slots=True)
class _Wish:
    loaded: LoadedModel
    capacity: int
    batch: int
    prefill_chunk: int


def choose_decoder(
    loaded: LoadedModel, capacity: int, batch: int = 1, *, options: DecoderOptions | None = None
) -> Decoder:
    """A decoder for `batch` sequences of at least `capacity` tokens each.

    Raises:
        QtoolError: memory, if the cache does not fit; unsupported, if the path that was asked for
            cannot be taken.
    """
    options = options or DecoderOptions()
    capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
    wish = _Wish(loaded, capacity, batch, options.prefill_chunk)
    asked = asked_path(options)
    refusals: list[str] = []
    for path, make in WAYS:
        if asked not in ("auto", path):
            continue
        made = make(wish, _and_so_on(refusals))
        if not isinstance(made, str):
            return made
        refusals.append(made)
    raise _cannot_take(loaded.model.__class__.__name__, options, refusals[0])


def refuse_path(options: DecoderOptions, device: torch.device, model: str) -> None:
    """Raise as `choose_decoder` for a path that no model can take on `device`."""
    if asked_path(options) == "graph" and device.type != "cuda":
        raise _cannot_take(model, options, NO_GPU)


def _cannot_take(who: str, options: DecoderOptions, why: str) -> QtoolError:
    said_by = PATH_VARIABLE if options.path == "auto" else Option("path")
    return cannot_take(who, asked_path(options), why, said_by)


# -- the ways, fastest first: each makes a decoder or says why not ------------------------------


def _make_fused(wish: _Wish, refusals: str) -> Decoder | str:
    if wish.loaded.device.type == "cpu":
        return _make_host_fused(wish)
    # Asked before the module is loaded, which needs what may not be installed here.
    if wish.loaded.device.type != "cuda":
        return NO_GPU
    if find_spec("cupy") is None:
        return NO_CUPY
    if _num_devices(wish.loaded.model) > 1:
        return SPREAD
    from qtool.runtime.decoders.fused import make_fused_decoder, why_not_fused

    refusal = why_not_fused(wish.loaded, wish.batch)
    if refusal is not None:
        return refusal
    cache = fixed_cache(wish.loaded.model.config, wish.capacity)
    assert cache is not None, "models of the common block have one"
    try:
        return make_fused_decoder(
            wish.loaded,
            cache,
            capacity=wish.capacity,
            batch=wish.batch,
            prefill_chunk=wish.prefill_chunk,
        )
    except CaptureFailed as error:
        return f"no fused kernels: {error}"


def _make_host_fused(wish: _Wish) -> Decoder | str:
    if wish.batch > 1:
        return f"the fused step takes one sequence, not {wish.batch}"
    if _num_devices(wish.loaded.model) > 1:
        return SPREAD
    # Loads the compiler of the kernels, which other devices do not need.
    from qtool.runtime.decoders.blocks import NotFusable
    from qtool.runtime.decoders.host_fused import make_host_decoder

    try:
        return make_host_decoder(
            wish.loaded, capacity=wish.capacity, prefill_chunk=wish.prefill_chunk
        )
    except NotFusable as reason:
        return str(reason)


def _make_graphed(wish: _Wish, refusals: str) -> Decoder | str:
    model = wish.loaded.model
    name = model.__class__.__name__
    if wish.loaded.device.type != "cuda":
        return NO_GPU
    if _num_devices(model) > 1:
        return SPREAD
    cache = fixed_cache(model.config, wish.capacity) if model._can_compile_fullgraph else None
    if cache is None:
        return f"{name} has no static cache in transformers"
    try:
        decoder = GraphDecoder(_network(wish), cache, capacity=wish.capacity, batch=wish.batch)
    except CaptureFailed as error:
        return f"no graph of {name}: {error}"
    if refusals:
        decoder.path_reason = f"{decoder.path_reason}; {refusals}"
    return decoder


def _make_eager(wish: _Wish, refusals: str) -> Decoder | str:
    return EagerDecoder(
        _network(wish),
        capacity=wish.capacity,
        batch=wish.batch,
        reason=refusals or "asked for",
    )


WAYS: Final[tuple[tuple[Path, Callable[[_Wish, str], Decoder | str]], ...]] = (
    ("fused", _make_fused),
    ("graph", _make_graphed),
    ("eager", _make_eager),
)


def _network(wish: _Wish) -> Network:
    # Of a spread model the embedding itself may lie elsewhere, or nowhere between two tokens.
    return Network(wish.loaded.model, wish.prefill_chunk, device=wish.loaded.device)


def _and_so_on(refusals: list[str]) -> str:
    """What the next slower way gives as its reason."""
    return "; ".join(dict.fromkeys(refusals))


def _num_devices(model: Any) -> int:
    return len(set((getattr(model, "hf_device_map", None) or {"": 0}).values()))


def asked_path(options: DecoderOptions) -> str:
    """The path to take, from the options or the environment.

    Raises:
        QtoolError: usage, for a word in QTOOL_PATH that is none.
    """
    if options.path != "auto":
        return options.path
    asked = os.environ.get(PATH_VARIABLE, "auto")
    if asked not in get_args(PathChoice):
        raise QtoolError(
            f"{PATH_VARIABLE}={asked} is no path",
            kind="usage",
            hint=f"one of {', '.join(get_args(PathChoice))}",
        )
    return asked
