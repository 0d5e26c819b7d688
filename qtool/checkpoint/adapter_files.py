"""The folder of a PEFT adapter as files: what has to be there, its config, its tensors' header."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.records import Shard, TensorInfo
from qtool.checkpoint.safetensors_header import read_header
from qtool.checkpoint.strict_json import parse_json_object
from qtool.errors import QtoolError

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
MAX_CONFIG_BYTES: Final = 10_000_000  # lists of thousands of target modules


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's config as it stands there, and what the header of its weights says."""

    config: Mapping[str, Any]
    config_sha256: str
    shard: Shard
    tensors: tuple[TensorInfo, ...]


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read config and header of the adapter in `folder`, whatever kind of adapter it is.

    Raises:
        QtoolError: not_found, or bad_file for what is cut or damaged.
    """
    _check_presence(folder)
    source = LocalFolder(folder)
    hint = f"fetch {CONFIG_NAME} again"
    size = source.status_of(CONFIG_NAME).num_bytes
    if size > MAX_CONFIG_BYTES:
        raise QtoolError(f"{folder}: {CONFIG_NAME} has {size:,} bytes", kind="bad_file", hint=hint)
    data = source.read(CONFIG_NAME, 0, size)
    config = parse_json_object(data, file=source.describe(CONFIG_NAME), hint=hint)
    status = source.status_of(WEIGHTS_NAME)
    header = read_header(folder / WEIGHTS_NAME)
    return AdapterFiles(
        config=config,
        config_sha256=hashlib.sha256(data).hexdigest(),
        shard=Shard(WEIGHTS_NAME, status.num_bytes, header.metadata, status.modified_ns),
        tensors=header.tensors,
    )


def _check_presence(folder: Path) -> None:
    if not folder.is_dir():
        raise QtoolError(
            f"{folder}: no such folder",
            kind="not_found",
            hint="give the folder of a PEFT adapter; `hf download ID` prints one of the Hub",
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS_NAME and (folder / "adapter_model.bin").is_file()
            raise QtoolError(
                f"{folder} holds no {name}" + (", only a pickle, which can run code" * pickled),
                kind="not_found",
                hint="give the folder of a PEFT adapter saved as safetensors",
            )
