"""Finds the model that a user named, reads its headers, index and config, and checks them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from qtool.checkpoint.config_json import CONFIG_NAME, read_config
from qtool.checkpoint.file_source import FileSource, Traffic
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.other_files import list_other_files
from qtool.checkpoint.records import Checkpoint, Shard
from qtool.checkpoint.safetensors_header import FIRST_READ_BYTES, Header, fetch_header
from qtool.checkpoint.weight_files import (
    FOREIGN_WEIGHTS,
    INDEX,
    SAFETENSORS,
    check_against_index,
    find_weight_files,
    no_weights,
    read_index,
    unfinished,
)
from qtool.errors import QtoolError
from qtool.events import Note, OnEvent, ignore_events

SPARE_BYTES: Final = 1024
HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
MODEL_HINT: Final = "give a local folder, or a Hub id such as Qwen/Qwen3-0.6B"


class HubReference(NamedTuple):
    """A model on the Hub as the user named it."""

    repo_id: str
    revision: str | None


def open_checkpoint(
    model: str,
    *,
    need: Literal["headers", "files"],
    on_event: OnEvent = ignore_events,
    need_config: bool = True,
    need_weights: bool | None = None,
) -> Checkpoint:
    """Find MODEL, read its config, index and safetensors headers, and check them all.

    Args:
        model: a local folder; a local safetensors file or config.json, which then is the whole
            model; or a Hub id with an optional @revision. What exists locally wins.
        need: "headers" reads a Hub model's headers by range requests and downloads no weights;
            "files" downloads what is not in the Hub cache yet, so that `path_of` works.
        need_config: a model is wanted, not tensors to look at: a missing config.json is an error,
            and so is one shard of several; else `config` is {}.
        need_weights: a model without safetensors is an error; by default so for "files". Else
            `shards` and `tensors` are empty, and a Note tells of weights in other formats.

    Raises:
        QtoolError: not_found, bad_file, unsupported, auth, network or no_space.
    """
    reference = locate_model(model)
    if isinstance(reference, HubReference):
        source = _open_on_hub(reference, need, on_event)
    else:
        source = _open_local(reference)
        if need_config:
            _refuse_one_of_several(reference)
    trust_numbers = need == "headers" and source.traffic is not None
    weights = find_weight_files(source, on_event, trust_numbers=trust_numbers)
    if not weights.shards:
        need_weights = need == "files" if need_weights is None else need_weights
        if need_weights and isinstance(reference, Path) and reference.is_file():
            raise _without_weights(reference)
        _check_none_needed(source, need_weights=need_weights, on_event=on_event)
    config = _read_config_if_any(source, need_config=need_config)
    headers = _read_headers(source, weights.shards)
    if source.traffic is not None:
        on_event(Note(_describe_traffic(len(headers), source.traffic), level="detail"))
    tensors = (tensor for header in headers for tensor in header.tensors)
    return Checkpoint(
        id=reference.repo_id if isinstance(reference, HubReference) else model,
        location="hub" if isinstance(reference, HubReference) else "local",
        revision=source.revision,
        folder=source.path,
        config=config,
        shards=tuple(
            Shard(name, status.num_bytes, header.metadata, status.modified_ns)
            for name, header in zip(weights.shards, headers, strict=True)
            for status in [source.status_of(name)]
        ),
        tensors=check_against_index(source, weights, tensors),
        other_files=list_other_files(source, are_needed=need == "files"),
    )


def open_in_background(
    model: str, *, need: Literal["headers", "files"], on_event: OnEvent = ignore_events
) -> Callable[[], Checkpoint]:
    """Begin to open a Hub model; the function waits for it, and returns or raises as above.

    While the Hub is asked, the caller imports what it needs next. A local model is opened only by
    the call. Nothing waits for the thread when the program ends earlier.
    """
    if not isinstance(locate_model(model), HubReference):
        return partial(open_checkpoint, model, need=need, on_event=on_event)
    from concurrent.futures import Future

    opened: Future[Checkpoint] = Future()

    def run() -> None:
        try:
            opened.set_result(open_checkpoint(model, need=need, on_event=on_event))
        except BaseException as error:
            opened.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return opened.result


def locate_model(model: str) -> Path | HubReference:
    """What the string MODEL means: a path that exists, else a Hub id; QtoolError if neither."""
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if model and _exists(path):
        return path
    repo_id, at, revision = model.partition("@")
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith(
        ("/", SAFETENSORS, ".json")
    )
    if looks_like_path or repo_id.count("/") > 1:
        raise QtoolError(
            f"{model}: no such folder or file",
            kind="not_found",
            hint=hint_for_missing(model),
        )
    if not HUB_ID.fullmatch(repo_id) or (at and not revision):
        raise QtoolError(
            f"{model or 'the empty name'}: no such folder, and no Hub id of the form "
            "NAME, ORG/NAME or ORG/NAME@REVISION",
            kind="not_found",
            hint=hint_for_missing(model),
        )
    return HubReference(repo_id, revision or None)


def hint_for_missing(model: str) -> str:
    """The next step where no folder is named `model`: its nearest neighbour, if there is one."""
    nearest = _nearest(model)
    return f"did you mean {nearest}?" if nearest else MODEL_HINT


def _nearest(model: str) -> Path | None:
    """What lies where the path leads, with one part of it written otherwise."""
    import difflib

    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    wrong = next((part for part in (*reversed(path.parents), path) if not _exists(part)), path)
    try:
        names = [entry.name for entry in wrong.parent.iterdir()]
    except (OSError, ValueError):
        return None
    for name in difflib.get_close_matches(wrong.name, names):
        found = wrong.parent / name / path.relative_to(wrong)
        if _exists(found):
            return found
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a path, a folder that may not be entered
        return False


def _open_on_hub(
    reference: HubReference, need: Literal["headers", "files"], on_event: OnEvent
) -> FileSource:
    from qtool.checkpoint.hub import open_on_hub

    with naming_the_nearest(reference.repo_id):
        return open_on_hub(*reference, need=need, on_event=on_event)


@contextmanager
def naming_the_nearest(repo_id: str) -> Iterator[None]:
    """Where the Hub has no `repo_id`, the error names a folder that may be meant."""
    from qtool.checkpoint.hub_errors import NoSuchModel

    try:
        yield
    except NoSuchModel as error:
        nearest = _nearest(repo_id)
        if nearest is None or not nearest.is_dir():
            raise
        raise error.with_hint(f"did you mean {nearest}? If not: {error.hint}") from error


def _open_local(path: Path) -> LocalFolder:
    if path.is_dir():
        return LocalFolder(path)
    if path.suffix == SAFETENSORS:
        return LocalFolder(path.parent, only=(path.name, CONFIG_NAME))
    if path.name == CONFIG_NAME:
        return LocalFolder(path.parent, only=(CONFIG_NAME,))
    raise QtoolError(
        f"{path}: expected a model folder, a *.safetensors file or a config.json, found "
        f"{'weights in another format' if path.suffix in FOREIGN_WEIGHTS else 'another file'}",
        kind="unsupported",
        hint=_hint_for_file(path),
    )


def _refuse_one_of_several(path: Path) -> None:
    """Raise QtoolError for a shard of which an index beside it says that there are others."""
    if path.suffix != SAFETENSORS or not path.is_file():
        return
    source = LocalFolder(path.parent)
    for index in sorted(path.parent.glob(f"*{INDEX}")):
        shards = set(read_index(source, index.name).values())
        if path.name in shards and len(shards) > 1:
            raise QtoolError(
                f"{path}: expected a whole model, found one of the {len(shards)} shards that "
                f"{index.name} names",
                kind="unsupported",
                hint=_hint_for_file(path),
            )


def _without_weights(path: Path) -> QtoolError:
    return QtoolError(
        f"{path}: expected a model folder or a *.safetensors file, found a file without weights",
        kind="not_found",
        hint=_hint_for_file(path),
    )


def _hint_for_file(path: Path) -> str:
    """The next step where `path` is a file that is no whole model: its folder, if that has one."""
    if any(path.parent.glob(f"*{SAFETENSORS}")):
        return f"give its folder, {path.parent}"
    return "give the folder of the original checkpoint, with *.safetensors"


def _check_none_needed(source: FileSource, *, need_weights: bool, on_event: OnEvent) -> None:
    error = no_weights(source)
    if need_weights or CONFIG_NAME not in source.files:
        raise error
    if error.kind == "unsupported":
        on_event(Note(f"{error.message}; going by config.json alone", level="warning"))


def _read_config_if_any(source: FileSource, *, need_config: bool) -> Mapping[str, Any]:
    if CONFIG_NAME in source.files:
        return read_config(source)
    if not need_config:
        return {}
    raise unfinished(source) or QtoolError(
        f"{source.describe('').rstrip('/')}: expected a config.json beside the weights, found none",
        kind="bad_file",
        hint=source.missing_hint,
    )


def _describe_traffic(num_headers: int, traffic: Traffic) -> str:
    return (
        f"read {num_headers:,} header{'' if num_headers == 1 else 's'} in "
        f"{traffic.num_requests:,} requests, {traffic.num_bytes:,} bytes fetched, "
        f"{traffic.seconds:.2f} s"
    )


def _read_headers(source: FileSource, shards: Sequence[str]) -> list[Header]:
    first_read_bytes = FIRST_READ_BYTES

    def read(shard: str) -> Header:
        nonlocal first_read_bytes
        header = fetch_header(
            partial(source.read, shard),
            shard=shard,
            file=source.describe(shard),
            file_bytes=source.status_of(shard).num_bytes,
            first_read_bytes=first_read_bytes,
        )
        # Shards of one model have headers of much the same length: spare the next its second read.
        first_read_bytes = max(first_read_bytes, header.data_start + SPARE_BYTES)
        return header

    if source.num_parallel_reads == 1:
        return list(map(read, shards))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(source.num_parallel_reads) as pool:
        return list(pool.map(read, shards))
