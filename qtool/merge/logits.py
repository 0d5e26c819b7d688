"""What merging did to the model: its logits for a prompt, beside the base's with the adapter.

Two loads, one after the other: the base, without and with the adapter, then the merged model. It
needs `qtool[run]` and peft, and memory for one of them at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.records import Checkpoint
from qtool.doctor.machine import available_memory_bytes
from qtool.errors import QtoolError
from qtool.events import Note, OnEvent, ignore_events
from qtool.formats.bitsandbytes import find_quantized
from qtool.formats.precisions import QuantizedPrecision
from qtool.runtime.adapters import add_adapter
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.memory import out_of_memory_as_error
from qtool.runtime.placement import resolve_device
from qtool.runtime.prompts import encode_text
from qtool.runtime.quiet import quiet_transformers
from qtool.runtime.requirements import require_peft

MAX_TOKENS: Final = 512
# Beside the weights: activations, logits of all tokens, what loading holds for a moment.
SPARE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class LogitChange:
    """Largest absolute differences of logits, over all tokens of the prompt and the vocabulary.

    `merging` is between the merged model and the base with the adapter, `adapter` between the base
    with and without it: what it is to be measured by. `num_other_choices` counts the tokens of the
    prompt after which another token is likeliest.
    """

    merging: float
    adapter: float
    num_tokens: int
    num_other_choices: int
    device: str
    dtype: str


def compare_logits(
    merged: Path,
    trained_on: str,
    adapter: Path,
    prompt: str,
    *,
    quant: QuantizedPrecision | None = None,
    on_event: OnEvent = ignore_events,
    look: Callable[[], None] = lambda: None,
) -> LogitChange:
    """Run `prompt` through both models; `quant` packs the base while it loads.

    `look` is called where much memory is in use.

    Raises:
        QtoolError: memory, where one of them does not fit; unsupported or not_found where they
            cannot be run.
    """
    require_peft()
    base = open_checkpoint(trained_on, need="files", on_event=on_event)
    options = _options([base, open_checkpoint(str(merged), need="files")])
    note = "checking the logits: loading the base, then the merged model; --no-check leaves it out"
    on_event(Note(note))
    with _load(trained_on, replace(options, quant=quant), on_event) as loaded:
        token_ids = encode_text(loaded.tokenizer, prompt)[:MAX_TOKENS]
        without = _logits(loaded, token_ids)
        _add_adapter(loaded, adapter)
        unmerged = _logits(loaded, token_ids)
        look()
    del loaded
    _free()
    with _load(str(merged), options, on_event) as loaded:
        found = _logits(loaded, token_ids)
        look()
        device = str(loaded.device)
    del loaded
    _free()
    return LogitChange(
        merging=_largest_difference(found, unmerged),
        adapter=_largest_difference(unmerged, without),
        num_tokens=len(token_ids),
        num_other_choices=int((found.argmax(-1) != unmerged.argmax(-1)).sum()),
        device=device,
        dtype=options.compute_dtype or "its own dtype",
    )


def _add_adapter(loaded: LoadedModel, adapter: Path) -> None:
    with quiet_transformers():
        add_adapter(loaded.model, adapter)


def _load(model: str, options: LoadOptions, on_event: OnEvent) -> LoadedModel:
    return load_model(model, options, on_event=on_event)


def _logits(loaded: LoadedModel, token_ids: list[int]) -> Tensor:
    """float32 (tokens, vocabulary), on the host."""
    prompt = torch.tensor([token_ids], device=loaded.device)
    with (
        quiet_transformers(),
        out_of_memory_as_error("checking the logits"),
        torch.inference_mode(),
    ):
        logits: Tensor = loaded.model(input_ids=prompt, use_cache=False).logits
    return logits[0].float().cpu()


def _largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _options(models: list[Checkpoint]) -> LoadOptions:
    """float32 where it fits, for then the difference is the weights'; else the model's own dtype.

    The GPU where one of both fits, else the host.
    """
    places = {"cpu": available_memory_bytes()[0]}
    if (gpu := resolve_device("auto")).type == "cuda":
        places = {str(gpu): torch.cuda.mem_get_info(gpu)[0]} | places
    needed: dict[str | None, int] = {
        dtype: max(_loaded_bytes(model, in_float32=dtype is not None) for model in models)
        for dtype in ("float32", None)
    }
    for device, available in places.items():
        for dtype, num_bytes in needed.items():
            if num_bytes + SPARE_BYTES <= available:
                return LoadOptions(compute_dtype=dtype, device=device)
    raise QtoolError(
        f"the models take {min(needed.values()):,} bytes, more than is free on any device",
        kind="memory",
        hint="compare them on a larger machine with `qtool generate`",
    )


def _loaded_bytes(model: Checkpoint, *, in_float32: bool) -> int:
    """What a model takes once loaded: packed weights as they are."""
    packed = {
        part.name
        for weight in find_quantized(model.tensors).values()
        for part in (weight.weight, *weight.statistics.values())
    }
    return sum(
        4 * tensor.num_elements if in_float32 and tensor.name not in packed else tensor.num_bytes
        for tensor in model.tensors.values()
    )
