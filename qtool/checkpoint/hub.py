"""A model on the Hugging Face Hub: its list of files, parts of them by range requests, downloads.

All requests go through huggingface_hub and so honour HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE. What its cache holds already is read from there.
"""

from __future__ import annotations

import glob
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from qtool import __version__
from qtool.checkpoint.config_json import CONFIG_NAME, MAX_CONFIG_BYTES
from qtool.checkpoint.file_source import FileSource, FileStatus, Traffic
from qtool.checkpoint.hub_errors import hub_errors, no_hub_answer
from qtool.checkpoint.hub_requests import HubRequests
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.other_files import list_other_files
from qtool.checkpoint.weight_files import find_weight_files
from qtool.errors import QtoolError
from qtool.events import Advanced, Finished, Note, OnEvent, Started, ignore_events

NUM_PARALLEL_READS: Final = 32
NUM_PARALLEL_DOWNLOADS: Final = 8
PROGRESS_INTERVAL_S: Final = 0.25
COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class HubRepository:
    """One commit of a model repository; reads come from the local cache where it has the file.

    Args:
        repo_id: ORG/NAME, or NAME.
        revision: the commit.
        files: name -> bytes, sorted.
        requests: what is read goes through them.
        ahead: whole files that were read with the list already.
    """

    path: Final = None
    num_parallel_reads: Final = NUM_PARALLEL_READS
    missing_hint: Final = "the model's repository is incomplete; take another revision or model"

    def __init__(
        self,
        repo_id: str,
        revision: str,
        files: Mapping[str, int],
        requests: HubRequests,
        *,
        ahead: Mapping[str, bytes],
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.files = files
        self._requests = requests
        self._ahead = ahead
        self._snapshot = find_snapshot(repo_id, revision)

    @property
    def traffic(self) -> Traffic:
        """What the requests have cost so far."""
        return self._requests.traffic

    def describe(self, name: str) -> str:
        """How messages name the file `name`."""
        return f"{self.repo_id}/{name}"

    def status_of(self, name: str) -> FileStatus:
        """The file's size, as the Hub lists it."""
        return FileStatus(self.files[name], None)

    def is_cached(self, name: str) -> bool:
        """Whether the whole file lies in the local cache."""
        cached = self._snapshot.files if self._snapshot is not None else {}
        return cached.get(name) == self.files[name]

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` of the file `name` from `offset` on, by a range request at need."""
        if self._snapshot is not None and self.is_cached(name):
            return self._snapshot.read(name, offset, num_bytes)
        if name in self._ahead:
            return self._ahead[name][offset : offset + num_bytes]
        with hub_errors(self.repo_id, self.revision):
            return self._requests.fetch_range(self.revision, name, offset, num_bytes)


def open_on_hub(
    repo_id: str,
    revision: str | None,
    *,
    need: Literal["headers", "files"],
    on_event: OnEvent,
) -> FileSource:
    """The model's files: on the Hub, or with need="files" downloaded into the cache.

    Without a connection, what the cache holds of that revision.
    """
    repository = list_on_hub(repo_id, revision, read_config=need == "headers", on_event=on_event)
    if need == "headers" or isinstance(repository, LocalFolder):
        return repository
    weights = find_weight_files(repository, ignore_events)
    if not weights.shards:  # nothing to download; the caller says why
        return repository
    index = () if weights.index is None else (weights.index,)
    named = (CONFIG_NAME, *index, *weights.shards, *list_other_files(repository, are_needed=True))
    return download(repository, revision, named, on_event)


def list_on_hub(
    repo_id: str, revision: str | None, *, read_config: bool = False, on_event: OnEvent
) -> HubRepository | LocalFolder:
    """What the repository holds; without a connection, what the cache holds of that revision.

    Args:
        read_config: config.json will be read, so it is asked for at the same time.
    """
    snapshot = find_snapshot(repo_id, revision)
    try:
        repository = _list_repository(
            repo_id, revision, read_config=read_config and snapshot is None
        )
    except QtoolError as error:
        if snapshot is None or error.kind != "network":
            raise
        text = f"the Hub cannot be reached; using the cached copy at {snapshot.revision}"
        on_event(Note(text, level="detail" if _is_offline() else "warning"))
        return snapshot
    on_event(Note(f"{repo_id} is at commit {repository.revision}", level="detail"))
    return repository


def download(
    repository: HubRepository, revision: str | None, names: Iterable[str], on_event: OnEvent
) -> LocalFolder:
    """Those of `names` that the repository has, in the cache; what is there is not fetched again.

    Args:
        revision: as the user named it.
    """
    wanted = [name for name in names if name in repository.files]
    missing = [name for name in wanted if not repository.is_cached(name)]
    missing_bytes = sum(repository.files[name] for name in missing)
    folder = _download(repository.repo_id, revision, wanted, missing_bytes, on_event)
    return LocalFolder(folder, revision=folder.name, only=wanted)


def find_snapshot(repo_id: str, revision: str | None) -> LocalFolder | None:
    """The cached files of the revision, which may be few of them; None if there are none.

    The cache's layout is public: refs/REVISION holds a commit, snapshots/COMMIT its files.
    """
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}")
    revision = revision or constants.DEFAULT_REVISION
    try:
        is_commit = COMMIT.fullmatch(revision) is not None
        commit = revision if is_commit else (cached / "refs" / revision).read_text().strip()
        folder = cached / "snapshots" / commit
        found = COMMIT.fullmatch(commit) is not None and folder.is_dir()
    except (OSError, ValueError):
        return None
    return LocalFolder(folder, revision=commit) if found else None


def _list_repository(repo_id: str, revision: str | None, *, read_config: bool) -> HubRepository:
    from concurrent.futures import ThreadPoolExecutor

    with hub_errors(repo_id, revision), ThreadPoolExecutor(1) as pool:
        requests = HubRequests(repo_id)
        config = pool.submit(_try_config, requests, revision) if read_config else None
        description = requests.fetch_description(revision)
    commit = description.get("sha")
    if not isinstance(commit, str):
        raise no_hub_answer(repo_id)
    files = _list_files(repo_id, description)
    config_commit, config_data = config.result() if config else ("", b"")
    fits = config_commit == commit and len(config_data) == files.get(CONFIG_NAME)
    return HubRepository(
        repo_id, commit, files, requests, ahead={CONFIG_NAME: config_data} if fits else {}
    )


def _try_config(requests: HubRequests, revision: str | None) -> tuple[str, bytes]:
    """The commit and config.json, asked for while the list of files is on its way."""
    try:
        return requests.fetch_start(revision, CONFIG_NAME, MAX_CONFIG_BYTES)
    except Exception:  # the list, or reading the file for good, says what is wrong
        return "", b""


def _list_files(repo_id: str, description: Mapping[str, Any]) -> dict[str, int]:
    try:
        files = {file["rfilename"]: file["size"] for file in description["siblings"]}
    except (KeyError, TypeError) as error:
        raise no_hub_answer(repo_id) from error
    if {*map(type, files)} - {str} or {*map(type, files.values())} - {int}:
        raise no_hub_answer(repo_id)
    return {name: files[name] for name in sorted(files) if not _is_hidden(name)}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or not part for part in name.split("/"))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# -- downloads ----------------------------------------------------------------------------------


def _download(
    repo_id: str,
    revision: str | None,
    wanted: Collection[str],
    missing_bytes: int,
    on_event: OnEvent,
) -> Path:
    """Bring the files `wanted` into the cache; the snapshot's folder."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    _check_space(cache, missing_bytes)
    blobs = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
    progress = _progress_of(blobs, missing_bytes, on_event)
    with hub_errors(repo_id, revision), _no_foreign_bars(), progress:
        folder = snapshot_download(
            repo_id,
            # Not the commit: the cache then remembers it as this revision's, for offline use.
            revision=revision,
            allow_patterns=[glob.escape(name) for name in wanted],
            max_workers=NUM_PARALLEL_DOWNLOADS,
            library_name="qtool",
            library_version=__version__,
        )
    return Path(folder)


def _check_space(cache: Path, num_bytes: int) -> None:
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes:
        raise QtoolError(
            f"{cache}: expected {num_bytes:,} free bytes for the download, found {free_bytes:,}",
            kind="no_space",
            hint="free some space, or set HF_HOME to a folder on another disk",
        )


@contextmanager
def _progress_of(blobs: Path, total_bytes: int, on_event: OnEvent) -> Iterator[None]:
    """Report the growth of the cache's folder `blobs` as progress, from a thread.

    huggingface_hub's own progress callbacks differ from version to version; its folders do not.
    """
    if total_bytes == 0:
        yield
        return
    start_bytes, sent_bytes = _bytes_in(blobs), 0
    done = threading.Event()

    def report(upper_bound: int) -> None:
        nonlocal sent_bytes
        if upper_bound > sent_bytes:
            on_event(Advanced(upper_bound - sent_bytes))
            sent_bytes = upper_bound

    def watch() -> None:
        while not done.wait(PROGRESS_INTERVAL_S):
            report(min(total_bytes, _bytes_in(blobs) - start_bytes))

    on_event(Started("download", total_bytes))
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    report(total_bytes)
    on_event(Finished("download"))


def _bytes_in(folder: Path) -> int:
    num_bytes = 0
    for path in folder.glob("*"):
        try:
            num_bytes += path.stat().st_size
        except FileNotFoundError:  # renamed to its final name meanwhile
            continue
    return num_bytes


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
