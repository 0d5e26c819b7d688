"""What an adapter is merged onto: the packed weights it was trained against, or their original.

"dequantized" reproduces what was trained; "original" puts the same update onto the weights from
before quantization, which the adapter has never seen. Where the sum is quantized again to the
format of the base, "original" is the default: dequantized weights lie on the steps that the sum is
rounded to, so that an update of less than half a step is lost, weight by weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.records import Checkpoint
from qtool.errors import Option, QtoolError, Words
from qtool.events import Note, OnEvent
from qtool.formats.bitsandbytes import find_quantized
from qtool.formats.precisions import QuantizedPrecision
from qtool.merge.adapter import Adapter
from qtool.quantize.folder_state import read_finished_manifest

Onto = Literal["dequantized", "original"]


@dataclass(frozen=True, slots=True)
class Base:
    """The weights to merge onto.

    `trained_on` is the model that the adapter was trained on, as it can be loaded: for "original"
    it may be packed where `checkpoint` is not, or was packed while loading, as `trained_quant`.
    `reason` says why `onto` was taken.
    """

    checkpoint: Checkpoint
    onto: Onto
    reason: str
    trained_on: str
    trained_quant: QuantizedPrecision | None = None


def find_base(
    adapter: Adapter,
    model: str | None,
    onto: Onto | None,
    on_event: OnEvent,
    *,
    quant: QuantizedPrecision | None = None,
) -> Base:
    """Open the base: `model`, or what the adapter's config names; `quant` is what the sum becomes.

    Raises:
        QtoolError: it is not there; it is quantized in another way; "original" of a packed one that
            does not name its source, "dequantized" of one that is not packed.
    """
    named = model or adapter.base
    if named is None:
        raise QtoolError(
            f"{adapter.folder}: the config names no base model",
            kind="usage",
            hint=("name it with ", Option("base", "MODEL")),
        )
    checkpoint = _open(named, adapter, from_config=model is None, on_event=on_event)
    precisions = {weight.precision for weight in find_quantized(checkpoint.tensors).values()}
    if not precisions:
        if onto == "dequantized":
            raise QtoolError(
                f"{named} is not packed, so there is nothing to dequantize",
                kind="usage",
                hint=(
                    "if the adapter was trained on it quantized while loading, pack it in the same "
                    f"way, `qtool quantize {named} -o PACKED --quant P`, and give ",
                    Option("base", "PACKED"),
                ),
            )
        reason = "asked for" if onto else f"{short_name(checkpoint)} is not packed"
        trained_on = _trained_on(adapter, named)
        trained_quant = adapter.trained_quant if trained_on == named else None
        if trained_quant is not None and onto is None:
            on_event(_note_of_training(named, trained_quant, quant))
        return Base(checkpoint, "original", reason, trained_on, trained_quant)
    packed_again = quant is not None and any(same_codes(quant, packed) for packed in precisions)
    if onto is None and packed_again:
        original = _original_by_default(checkpoint, cast(QuantizedPrecision, quant), on_event)
        reason = f"{short_name(checkpoint)} packed as {quant} again loses part of the adapter"
        return Base(original, "original", reason, named)
    if onto != "original":
        if packed_again:
            on_event(Note(_rounded_away(named, quant), "warning"))
        reason = "asked for" if onto else "the adapter was trained against the packed weights"
        packed = ", ".join(sorted(precisions))
        return Base(checkpoint, "dequantized", f"{reason}, {packed}", named)
    original = _original_of(checkpoint, on_event)
    return Base(original, "original", f"asked for; {named} was quantized from it", named)


def same_codes(one: QuantizedPrecision, other: QuantizedPrecision) -> bool:
    """Whether both round to the same numbers, up to how their scales are stored."""
    return one.removesuffix("-dq") == other.removesuffix("-dq")


def short_name(checkpoint: Checkpoint) -> str:
    """A folder's own name, or a Hub id with the first digits of its commit."""
    if checkpoint.location == "local":
        return Path(checkpoint.id).resolve().name
    return f"{checkpoint.id}@{checkpoint.revision[:7]}" if checkpoint.revision else checkpoint.id


def _rounded_away(named: str, quant: QuantizedPrecision | None) -> Words:
    """What packing alike again does to an adapter, and the ways around it."""
    return (
        f"{named} is packed already, and a weight that is rounded to {quant} again keeps its "
        "update only if that is about half a step or more: part of the adapter is lost, or all of "
        "it if it is small. ",
        Option("onto", "original"),
        " often keeps more of it, 16 bit (without ",
        Option("quant"),
        f") and `qtool generate {named} --adapter` keep all",
    )


def _note_of_training(
    named: str, trained: QuantizedPrecision, quant: QuantizedPrecision | None
) -> Note:
    """What to know where the base was packed only while it was loaded for training."""
    was = f"the adapter was trained against {trained} weights, packed while loading"
    if quant is not None and same_codes(quant, trained):  # no better way to these
        return Note(
            f"{was}; it is merged onto the weights from before, as packing alike twice can lose "
            "more of it"
        )
    packing = f"{was}; to merge onto those, `qtool quantize {named} -o PACKED --quant {trained}`"
    return Note((packing, " first, and ", Option("base", "PACKED")), "warning")


def _trained_on(adapter: Adapter, named: str) -> str:
    """The packed model that the adapter names, where another was given to merge onto."""
    own = adapter.base
    if own is None or not Path(own).is_dir():
        return named
    return named if Path(named).is_dir() and Path(named).samefile(own) else own


def _open(named: str, adapter: Adapter, *, from_config: bool, on_event: OnEvent) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(named, need="files", on_event=on_event)
    except QtoolError as error:
        if from_config and error.kind == "not_found":
            raise QtoolError(
                f"{adapter.folder}: the base model that its config names is not here: "
                f"{error.message}",
                kind="not_found",
                hint=("name its place with ", Option("base", "MODEL")),
            ) from error
        raise
    _refuse_other_methods(checkpoint)
    return checkpoint


def _refuse_other_methods(checkpoint: Checkpoint) -> None:
    entry = checkpoint.config.get("quantization_config")
    if not entry:
        return
    method = entry.get("quant_method", "bitsandbytes") if isinstance(entry, Mapping) else entry
    if method != "bitsandbytes":
        raise QtoolError(
            f"{checkpoint.id}: config.json says quant_method {method!r}, expected bitsandbytes "
            "or a full-precision model",
            kind="unsupported",
            hint=("merge onto the full-precision original with ", Option("base", "MODEL")),
        )
    if not find_quantized(checkpoint.tensors):
        raise QtoolError(
            f"{checkpoint.id}: config.json says it is quantized, but no packed weight is in it",
            kind="bad_file",
            hint="remove quantization_config from its config.json to treat it as a 16-bit model",
        )


def _original_by_default(
    packed: Checkpoint, quant: QuantizedPrecision, on_event: OnEvent
) -> Checkpoint:
    """The original, which nobody asked for: without it, the ways that are left."""
    try:
        return _original_of(packed, on_event)
    except QtoolError as error:
        raise QtoolError(
            f"{error.message}; without it, packing {short_name(packed)} as {quant} again would "
            "lose part of the adapter, or all of it",
            kind=error.kind,
            hint=(
                "say where the original is with ",
                Option("base", "MODEL"),
                ", merge to 16 bit without ",
                Option("quant"),
                ", or lose that with ",
                Option("onto", "dequantized"),
            ),
        ) from error


def _original_of(packed: Checkpoint, on_event: OnEvent) -> Checkpoint:
    """The full-precision model that the packed one was made from, by its manifest."""
    assert packed.folder is not None
    hint = ("say where the original is with ", Option("base", "MODEL"))
    manifest = read_finished_manifest(packed.folder)
    source = (manifest or {}).get("source")
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        raise QtoolError(
            f"{packed.id} has no {MANIFEST} that names its original", kind="usage", hint=hint
        )
    if "adapter" in source:
        raise QtoolError(
            f"{packed.id} was merged from {source['model']} and an adapter: there is no original "
            "of it but the 16-bit merge",
            kind="usage",
            hint=hint,
        )
    if source.get("revision"):
        original_id = f"{source['model']}@{source['revision']}"
        return open_checkpoint(original_id, need="files", on_event=on_event)
    why = "which is neither beside it nor here"  # the manifest has the name alone
    for folder in (packed.folder.resolve().parent / source["model"], Path(source["model"])):
        if folder.is_dir():
            original = open_checkpoint(str(folder), need="files", on_event=on_event)
            if _file_sizes(original) == source.get("files"):
                return original
            why = f"but {folder} has other files now"
    raise QtoolError(
        f"{packed.id} was quantized from {source['model']}, {why}", kind="not_found", hint=hint
    )


def _file_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    return {shard.file_name: shard.file_bytes for shard in checkpoint.shards}
