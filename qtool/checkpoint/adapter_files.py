"""A PEFT adapter as files, here or on the Hub: what has to be there, its config, its header."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.checkpoint.file_source import FileSource
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.open import MODEL_HINT, HubReference, locate_model, naming_the_nearest
from qtool.checkpoint.records import Shard, TensorInfo
from qtool.checkpoint.safetensors_header import fetch_header
from qtool.checkpoint.strict_json import parse_json_object
from qtool.errors import Option, QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantizedPrecision

if TYPE_CHECKING:
    from qtool.checkpoint.hub import HubRepository

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"
PREFIX: Final = "base_model.model."  # what PEFT puts before the names of the model
FINETUNE_RECORD: Final = "qtool_finetune.json"  # what `qtool finetune` writes beside an adapter
FINETUNE_SAVES: Final = "checkpoints"  # where it saves, and what it says of a run that began
# Files that make a tokenizer. Training may add tokens or a chat template, so that the adapter's own
# is the one to keep.
TOKENIZER_FILES: Final = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("chat_template.jinja", "chat_template.json"),
    }
)
MAX_CONFIG_BYTES: Final = 10_000_000  # lists of thousands of target modules


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's config as it stands there, and what the header of its weights says."""

    config: Mapping[str, Any]
    config_sha256: str
    shard: Shard
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """Where an adapter lies: `folder`, which is in the Hub's cache for `hub_id` at `revision`."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        """As messages name it."""
        if self.hub_id is None:
            return str(self.folder)
        return f"{self.hub_id}@{self.revision[:7]}" if self.revision else self.hub_id


def find_adapter(adapter: str | Path, on_event: OnEvent = ignore_events) -> AdapterPlace:
    """The folder that ADAPTER means: it, or that of a Hub id, downloaded into the cache.

    What exists locally wins. Whether that is an adapter is for `read_adapter_files` to say.

    Raises:
        QtoolError: neither; on the Hub, no adapter; auth, network or no_space.
    """
    reference = _locate(adapter)
    if not isinstance(reference, HubReference):
        return AdapterPlace(reference)
    from qtool.checkpoint.hub import HubRepository, download

    source = _list_on_hub(reference, on_event)
    if isinstance(source, HubRepository):
        names = (CONFIG_NAME, WEIGHTS_NAME, FINETUNE_RECORD, *sorted(TOKENIZER_FILES))
        source = download(source, reference.revision, names, on_event)
    return AdapterPlace(source.path, reference.repo_id, source.revision)


def read_adapter(adapter: str | Path, on_event: OnEvent = ignore_events) -> AdapterFiles:
    """The same of ADAPTER as `find_adapter` takes it, without its weights: of a Hub id the header
    is read where it lies.

    Raises:
        QtoolError: what `find_adapter` and `read_adapter_files` raise.
    """
    reference = _locate(adapter)
    if not isinstance(reference, HubReference):
        return read_adapter_files(reference)
    return _read_files(_list_on_hub(reference, on_event), reference.repo_id)


def _locate(adapter: str | Path) -> Path | HubReference:
    if isinstance(adapter, Path):
        return adapter
    try:
        return locate_model(adapter)
    except QtoolError as error:
        if error.hint != MODEL_HINT:
            raise
        raise error.with_hint(
            f"give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a Hub id that has them"
        ) from None


def _list_on_hub(reference: HubReference, on_event: OnEvent) -> HubRepository | LocalFolder:
    from qtool.checkpoint.hub import list_on_hub

    with naming_the_nearest(reference.repo_id):
        source = list_on_hub(*reference, on_event=on_event)
    _check_files(source, reference.repo_id)
    return source


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read config and header of the adapter in `folder`, whatever kind of adapter it is.

    Raises:
        QtoolError: not_found, also for a run of `qtool finetune` that has not ended; bad_file for
            what is cut or damaged.
    """
    if not folder.is_dir():
        raise QtoolError(
            f"{folder}: no such folder",
            kind="not_found",
            hint="give the folder of a PEFT adapter, or its Hub id",
        )
    _refuse_unfinished(folder)
    # Not the other files of OUT: a run's saves may be many.
    source = LocalFolder(folder, only=(CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))
    _check_files(source, str(folder))
    return _read_files(source, str(folder))


def _read_files(source: FileSource, name: str) -> AdapterFiles:
    """Config and header of the adapter that messages call `name`."""
    hint = f"fetch {CONFIG_NAME} again"
    size = source.status_of(CONFIG_NAME).num_bytes
    if size > MAX_CONFIG_BYTES:
        raise QtoolError(f"{name}: {CONFIG_NAME} has {size:,} bytes", kind="bad_file", hint=hint)
    data = source.read(CONFIG_NAME, 0, size)
    config = parse_json_object(data, file=source.describe(CONFIG_NAME), hint=hint)
    status = source.status_of(WEIGHTS_NAME)
    header = fetch_header(
        partial(source.read, WEIGHTS_NAME),
        shard=WEIGHTS_NAME,
        file=source.describe(WEIGHTS_NAME),
        file_bytes=status.num_bytes,
    )
    return AdapterFiles(
        config=config,
        config_sha256=hashlib.sha256(data).hexdigest(),
        shard=Shard(WEIGHTS_NAME, status.num_bytes, header.metadata, status.modified_ns),
        tensors=header.tensors,
    )


def trained_quant(source: LocalFolder) -> QuantizedPrecision | None:
    """What the base was packed as in training, if `qtool finetune` made the adapter.

    Raises:
        QtoolError: bad_file, where its record is damaged.
    """
    if source.files.get(FINETUNE_RECORD, MAX_CONFIG_BYTES + 1) > MAX_CONFIG_BYTES:
        return None
    data = source.read(FINETUNE_RECORD, 0, MAX_CONFIG_BYTES)
    hint = "fetch it again, or remove it"
    model = parse_json_object(data, file=source.describe(FINETUNE_RECORD), hint=hint).get("model")
    quant = model.get("quant") if isinstance(model, dict) else None
    return quant if quant in QUANTIZED_PRECISIONS else None


def _refuse_unfinished(folder: Path) -> None:
    saves = folder / FINETUNE_SAVES
    is_begun = (saves / "run.json").is_file()
    if not is_begun or any((folder / name).is_file() for name in (FINETUNE_RECORD, CONFIG_NAME)):
        return
    whole = [path.parent for path in saves.glob("checkpoint-*/whole.json")]
    found = [save for save in whole if (save / CONFIG_NAME).is_file()]
    last = max(found, key=lambda save: int(save.name.rpartition("-")[2]), default=None)
    raise QtoolError(
        f"{folder} holds an unfinished run of qtool finetune, and no adapter yet",
        kind="not_found",
        hint=(
            "the command that began it goes on with ",
            Option("resume"),
            "" if last is None else f"; its last save, {last}, is an adapter too",
        ),
    )


def _check_files(source: FileSource, name: str) -> None:
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if file not in source.files:
            pickled = file == WEIGHTS_NAME and PICKLE_NAME in source.files
            raise QtoolError(
                f"{name} holds no {file}" + (", only a pickle, which can run code" * pickled),
                kind="not_found",
                hint="give the folder or the Hub id of a PEFT adapter saved as safetensors",
            )
