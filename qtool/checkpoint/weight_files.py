"""Which safetensors files make the model, and whether they and the index agree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qtool.checkpoint.file_source import FileSource, read_whole
from qtool.checkpoint.names import is_shard_name, quoted
from qtool.checkpoint.output_place import WORK_FOLDER
from qtool.checkpoint.records import TensorInfo
from qtool.checkpoint.strict_json import json_type, parse_json_object
from qtool.errors import QtoolError
from qtool.events import Note, OnEvent

SAFETENSORS: Final = ".safetensors"
INDEX: Final = ".safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
ADAPTER_FILE: Final = "adapter_model.safetensors"
MAX_INDEX_BYTES: Final = 64_000_000
NUMBERED: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")

# Weights in formats that qtool does not read. Pickles can run code when they are loaded.
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOREIGN_WEIGHTS: Final = (
    *PICKLES,
    *(".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".npz", ".npy", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".pte", ".mlmodel", ".engine", ".nemo", ".tar", ".zip", ".gz", ".7z"),
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The model's shards, sorted, and the index that names them, if there is one."""

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None


def find_weight_files(
    source: FileSource, on_event: OnEvent, *, trust_numbers: bool = False
) -> WeightFiles:
    """Choose the shards: by model.safetensors, else by the index, else the only file there is.

    That is transformers' order. Without any safetensors file `shards` is empty; see `no_weights`.
    With `trust_numbers` the index, which can be larger than all headers, is not read where the
    shards are numbered and complete: it would only repeat what they and their headers say.

    Raises:
        QtoolError: bad_file for a broken index or several files without one; unsupported for a
            folder that holds only an adapter.
    """
    files = [name for name in _top_level(source) if name.endswith(SAFETENSORS)]
    indexes = [name for name in _top_level(source) if name.endswith(INDEX)]
    if SINGLE_FILE in files:
        index = next(iter(indexes), None)
        if index is not None and SINGLE_FILE not in read_index(source, index).values():
            text = f"{index} does not name {SINGLE_FILE}; using {SINGLE_FILE}, as transformers does"
            on_event(Note(text, level="warning"))
        return WeightFiles((SINGLE_FILE,))
    if indexes:
        index = f"model{INDEX}" if f"model{INDEX}" in indexes else indexes[0]
        if trust_numbers and (numbered := _complete_shards(files, index.removesuffix(INDEX))):
            return WeightFiles(numbered)
        weight_map = read_index(source, index)
        shards = tuple(sorted(set(weight_map.values())))
        _check_shards_exist(source, index, weight_map, shards)
        return WeightFiles(shards, index, weight_map)
    if files == [ADAPTER_FILE]:
        raise QtoolError(
            f"{source.describe(ADAPTER_FILE)}: expected a model, found a PEFT adapter alone",
            kind="unsupported",
            hint="give the base model that adapter_config.json names",
        )
    if len(files) > 1:
        raise unfinished(source) or _several_without_index(source, files)
    return WeightFiles(tuple(files))


def read_index(source: FileSource, name: str) -> Mapping[str, str]:
    """The index's weight_map, tensor name -> shard, every shard a plain file name."""
    file = source.describe(name)
    hint = "download or save the model again; its index is damaged"
    data = read_whole(source, name, max_bytes=MAX_INDEX_BYTES, hint=hint)
    weight_map: Any = parse_json_object(data, file=file, hint=hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "an empty one" if weight_map == {} else json_type(weight_map)
        raise QtoolError(
            f"{file}: expected an object weight_map, found {found}", kind="bad_file", hint=hint
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_shard_name(shard):
            raise QtoolError(
                f"{file}: tensor {quoted(tensor)}: expected the name of a safetensors file in the "
                f"same folder, found {quoted(shard)}",
                kind="bad_file",
                hint="an index may not lead out of its folder; do not trust the file's origin",
            )
    return weight_map


def check_against_index(
    source: FileSource, weights: WeightFiles, tensors: Iterable[TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors by name, each in exactly one shard: the one that the index names.

    Raises:
        QtoolError: bad_file, naming tensor, expected and found shard.
    """
    by_name: dict[str, TensorInfo] = {}
    for tensor in tensors:
        first = by_name.setdefault(tensor.name, tensor)
        if first is not tensor:
            raise _disagreement(
                source.describe(tensor.shard),
                tensor.name,
                "in one file",
                f"in {first.shard} and {tensor.shard}",
            )
    if weights.index is None or weights.weight_map is None:
        return by_name
    file = source.describe(weights.index)
    for name, shard in weights.weight_map.items():
        found = by_name[name].shard if name in by_name else None
        if found != shard:
            raise _disagreement(file, name, f"in {shard}", f"in {found or 'none'}")
    for name, tensor in by_name.items():
        if name not in weights.weight_map:
            raise _disagreement(
                file, name, "in the weight_map", f"only in {tensor.shard}, not in the index"
            )
    return by_name


def unfinished(source: FileSource) -> QtoolError | None:
    """The error for the output of a qtool command that was interrupted, or still runs."""
    if source.path is None or not (source.path / WORK_FOLDER).is_dir():
        return None
    return QtoolError(
        f"{source.path}: expected a model, found the output of a qtool command that did not finish",
        kind="not_found",
        hint="if it was interrupted, run it again: it goes on with what is missing",
    )


def no_weights(source: FileSource) -> QtoolError:
    """The error for a place without safetensors files, which says what lies there instead."""
    where = source.describe("").rstrip("/")
    if (error := unfinished(source)) is not None:
        return error
    names = _top_level(source)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return QtoolError(
            f"{where}: expected *.safetensors, found only pickles ({_some(pickles)}), which "
            "can run code when loaded",
            kind="unsupported",
            hint="convert a model that you trust: transformers' AutoModelForCausalLM"
            ".from_pretrained(MODEL).save_pretrained(NEW) writes safetensors",
        )
    foreign = [name for name in names if name.endswith(FOREIGN_WEIGHTS)]
    if foreign:
        return QtoolError(
            f"{where}: expected *.safetensors, found weights in another format ({_some(foreign)})",
            kind="unsupported",
            hint="give the original checkpoint that they were converted from",
        )
    return QtoolError(
        f"{where}: expected *.safetensors, found {_some(names) or 'no files'}",
        kind="not_found",
        hint="give a folder that holds config.json and *.safetensors, or a Hub id such as "
        "Qwen/Qwen3-0.6B",
    )


def _complete_shards(files: list[str], stem: str) -> tuple[str, ...]:
    """STEM-00001-of-00003.safetensors and its siblings; none if one of them is missing."""
    matches = [m for name in files if (m := NUMBERED.fullmatch(name)) and m[1] == stem]
    found = [(int(match[2]), int(match[3])) for match in matches]
    expected = [(number, len(found)) for number in range(1, len(found) + 1)]
    return tuple(match.string for match in matches) if sorted(found) == expected else ()


def _top_level(source: FileSource) -> list[str]:
    return [name for name in source.files if "/" not in name]


def _check_shards_exist(
    source: FileSource, index: str, weight_map: Mapping[str, str], shards: tuple[str, ...]
) -> None:
    missing = [shard for shard in shards if shard not in source.files]
    if missing:
        tensor = next(name for name, shard in weight_map.items() if shard == missing[0])
        raise QtoolError(
            f"{source.describe(index)}: tensor {quoted(tensor)}: expected the file {missing[0]}, "
            f"found no such file ({len(missing)} of {len(shards)} shards are missing)",
            kind="bad_file",
            hint=f"{source.missing_hint}; to plan without weights, give its config.json",
        )


def _several_without_index(source: FileSource, files: list[str]) -> QtoolError:
    where = source.describe("").rstrip("/")
    hint = "keep one model's weights in the folder, or give the file: qtool VERB FOLDER/FILE"
    if all(NUMBERED.fullmatch(name) for name in files):
        hint = f"download the model's *{INDEX} too"
    return QtoolError(
        f"{where}: expected {SINGLE_FILE} or *{INDEX}, found {len(files)} safetensors files "
        f"without an index ({_some(files)})",
        kind="bad_file",
        hint=hint,
    )


def _disagreement(file: str, tensor: str, expected: str, found: str) -> QtoolError:
    return QtoolError(
        f"{file}: tensor {quoted(tensor)}: expected it {expected}, found it {found}",
        kind="bad_file",
        hint="the files belong to different saves; download or save the model again",
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
