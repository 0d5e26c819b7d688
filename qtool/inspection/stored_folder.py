"""A folder read as far as it can be read: the evidence that the rules of `verify` look at.

Unlike `open_checkpoint`, which refuses a bad folder at its first fault, this keeps going: what
could not be read stands in its place as the error, and everything else is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from qtool.architecture import Architecture
from qtool.checkpoint.config_json import CONFIG_NAME, read_config
from qtool.checkpoint.file_source import read_whole
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.names import is_shard_name
from qtool.checkpoint.other_files import MANIFEST
from qtool.checkpoint.output_place import WORK_FOLDER
from qtool.checkpoint.records import TensorInfo
from qtool.checkpoint.safetensors_header import Header, read_header
from qtool.checkpoint.strict_json import parse_json_object
from qtool.checkpoint.weight_files import INDEX, MAX_INDEX_BYTES, SAFETENSORS
from qtool.errors import QtoolError
from qtool.events import Advanced, OnEvent
from qtool.formats.bitsandbytes import (
    QuantizedWeight,
    QuantState,
    find_quantized,
    layout_problems,
)
from qtool.inspection.summary import known_architecture
from qtool.inspection.weights import TensorFiles, read_quant_state

INDEX_NAME: Final = f"model{INDEX}"
MAX_MANIFEST_BYTES: Final = MAX_INDEX_BYTES
_MODEL_SHARD: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_HASH_CHUNK_BYTES: Final = 4 << 20
_HINT: Final = "download or save the folder again"

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """What lies in a folder. `None` means that a file is not there, an error that it is broken."""

    path: Path
    files: Mapping[str, int]  # relative name -> bytes, hidden files left out
    config: Mapping[str, Any] | QtoolError | None
    index: Mapping[str, Any] | QtoolError | None
    manifest: Mapping[str, Any] | QtoolError | None
    headers: Mapping[str, Header | QtoolError]  # by shard
    tensors: Mapping[str, TensorInfo]  # of the readable shards; the first of each name
    quantized: Mapping[str, QuantizedWeight]
    states: Mapping[str, QuantState | QtoolError]  # by 4-bit weight
    # Those whose statistics can be read without guessing: sizes, dtypes and code table fit.
    sound_weights: tuple[tuple[QuantizedWeight, QuantState | None], ...]
    architecture: Architecture | None
    reader: TensorFiles
    on_event: OnEvent

    @property
    def index_entries(self) -> Mapping[str, Any]:
        """The index's weight_map as it is; empty where there is no usable index."""
        return _weight_map(self.index)

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The entries of the index that name a file: tensor -> shard."""
        return {name: shard for name, shard in self.index_entries.items() if isinstance(shard, str)}

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """config.json's quantization_config; None where there is none."""
        entry = self.config.get("quantization_config") if isinstance(self.config, Mapping) else None
        return entry if isinstance(entry, Mapping) else None

    @property
    def manifest_files(self) -> Mapping[str, Any]:
        """The manifest's entries by file name; empty without a usable manifest."""
        files = self.manifest.get("files") if isinstance(self.manifest, Mapping) else None
        return files if isinstance(files, Mapping) else {}

    @property
    def has_work_folder(self) -> bool:
        """Whether a run of `qtool quantize` left its journal behind."""
        return (self.path / WORK_FOLDER).exists()

    @property
    def sound_four_bit(self) -> Iterator[tuple[QuantizedWeight, QuantState]]:
        """The 4-bit ones of `sound_weights`."""
        for weight, state in self.sound_weights:
            if state is not None:
                yield weight, state

    def sha256_of(self, name: str) -> str:
        """Hash a file of the folder; links may not leave it."""
        source = LocalFolder(self.path)
        digest, offset = hashlib.sha256(), 0
        while chunk := source.read(name, offset, _HASH_CHUNK_BYTES):
            digest.update(chunk)
            offset += len(chunk)
            self.on_event(Advanced(len(chunk), name))
        return digest.hexdigest()


def read_stored_folder(path: Path, reader: TensorFiles, on_event: OnEvent) -> StoredFolder:
    """Read everything but the weights.

    Raises:
        QtoolError: the folder itself cannot be listed.
    """
    source = LocalFolder(path)
    config = _if_there(source, CONFIG_NAME, partial(read_config, source))
    index = _if_there(source, INDEX_NAME, partial(_read_json, source, INDEX_NAME))
    manifest = _if_there(source, MANIFEST, partial(_read_json, source, MANIFEST))
    headers = {
        shard: _or_error(partial(read_header, path / shard)) for shard in _shards(source, index)
    }
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        for tensor in header.tensors if isinstance(header, Header) else ():
            tensors.setdefault(tensor.name, tensor)
    quantized = find_quantized(tensors)
    states = {
        weight.name: _or_error(partial(read_quant_state, weight, reader))
        for weight in quantized.values()
        if weight.quant_state is not None
    }
    return StoredFolder(
        path=path,
        files=source.files,
        config=config,
        index=index,
        manifest=manifest,
        headers=headers,
        tensors=tensors,
        quantized=quantized,
        states=states,
        sound_weights=tuple(_sound_weights(quantized, states)),
        architecture=known_architecture(config) if isinstance(config, Mapping) else None,
        reader=reader,
        on_event=on_event,
    )


def _shards(source: LocalFolder, index: object) -> list[str]:
    """The model's files that are there: those the index names, those named like shards, or the
    only safetensors file."""
    names = [name for name in source.files if is_shard_name(name)]
    indexed = {shard for shard in _weight_map(index).values() if isinstance(shard, str)}
    chosen = [name for name in names if name in indexed or _MODEL_SHARD.fullmatch(name)]
    return chosen or [name for name in names if name.endswith(SAFETENSORS)][:1]


def _sound_weights(
    quantized: Mapping[str, QuantizedWeight], states: Mapping[str, QuantState | QtoolError]
) -> Iterator[tuple[QuantizedWeight, QuantState | None]]:
    for weight in quantized.values():
        state = states.get(weight.name)
        if isinstance(state, QtoolError) or layout_problems(weight, state):
            continue
        if state is None or weight.precision.startswith(state.quant_type):
            yield weight, state


def _weight_map(index: object) -> Mapping[str, Any]:
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    return weight_map if isinstance(weight_map, Mapping) else {}


def _read_json(source: LocalFolder, name: str) -> Mapping[str, Any]:
    data = read_whole(source, name, max_bytes=MAX_MANIFEST_BYTES, hint=_HINT)
    return parse_json_object(data, file=source.describe(name), hint=_HINT)


def _if_there(
    source: LocalFolder, name: str, read: Callable[[], Value]
) -> Value | QtoolError | None:
    return _or_error(read) if name in source.files else None


def _or_error(read: Callable[[], Value]) -> Value | QtoolError:
    try:
        return read()
    except QtoolError as error:
        return error
