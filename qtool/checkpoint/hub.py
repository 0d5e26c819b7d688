"""A model on the Hugging Face Hub: its list of files, parts of them by range requests, downloads.

All requests go through huggingface_hub and so honour HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE. What its cache holds already is read from there.
"""

from __future__ import annotations

import errno
import glob
import json
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from qtool import __version__
from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.file_source import FileSource, FileStatus
from qtool.checkpoint.local_folder import LocalFolder
from qtool.checkpoint.other_files import list_other_files
from qtool.checkpoint.weight_files import find_weight_files
from qtool.errors import QtoolError
from qtool.events import Advanced, Finished, Note, OnEvent, Started, ignore_events

NUM_PARALLEL_READS: Final = 16
NUM_PARALLEL_DOWNLOADS: Final = 8
NUM_TRIES: Final = 3
LIST_TIMEOUT_S: Final = 30
PROGRESS_INTERVAL_S: Final = 0.25
ONLINE_HINT: Final = "check the connection, HF_ENDPOINT and proxies, and run the command again"


class HubRepository:
    """One commit of a model repository; reads come from the local cache where it has the file."""

    path: Final = None
    num_parallel_reads: Final = NUM_PARALLEL_READS
    missing_hint: Final = "the model's repository is incomplete; take another revision or model"

    def __init__(self, repo_id: str, revision: str, files: Mapping[str, int]) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.files = files
        self._snapshot = find_snapshot(repo_id, revision)

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
        with hub_errors(self.repo_id, self.revision):
            return _request_range(self.repo_id, self.revision, name, offset, num_bytes)


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
    try:
        repository = _list_repository(repo_id, revision)
    except QtoolError as error:
        snapshot = find_snapshot(repo_id, revision) if error.kind == "network" else None
        if snapshot is None:
            raise
        text = f"the Hub cannot be reached; using the cached copy at {snapshot.revision}"
        on_event(Note(text, level="detail" if _is_offline() else "warning"))
        return snapshot
    on_event(Note(f"{repo_id} is at commit {repository.revision}", level="detail"))
    if need == "headers":
        return repository
    weights = find_weight_files(repository, ignore_events)
    if not weights.shards:  # nothing to download; the caller says why
        return repository
    index = () if weights.index is None else (weights.index,)
    named = (CONFIG_NAME, *index, *weights.shards, *list_other_files(repository))
    wanted = [name for name in named if name in repository.files]
    missing = [name for name in wanted if not repository.is_cached(name)]
    missing_bytes = sum(repository.files[name] for name in missing)
    folder = _download(repo_id, revision, wanted, missing_bytes, on_event)
    return LocalFolder(folder, revision=folder.name, only=wanted)


def find_snapshot(repo_id: str, revision: str | None) -> LocalFolder | None:
    """The cached files of the revision, which may be few of them; None if there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[CONFIG_NAME]
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return LocalFolder(Path(folder), revision=Path(folder).name)


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into QtoolErrors that say what to do."""
    try:
        yield
    except Exception as error:
        translated = _translate(error, repo_id, revision)
        if translated is None:
            raise
        raise translated from error


def _list_repository(repo_id: str, revision: str | None) -> HubRepository:
    from huggingface_hub import HfApi

    api = HfApi(library_name="qtool", library_version=__version__)
    with hub_errors(repo_id, revision):
        try:
            info = api.model_info(
                repo_id, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _no_hub_answer(repo_id) from error
    if info.sha is None or info.siblings is None:
        raise _no_hub_answer(repo_id)
    files: dict[str, int] = {}
    for file in sorted(info.siblings, key=lambda file: file.rfilename):
        if file.size is None:
            raise _no_hub_answer(repo_id)
        if not _is_hidden(file.rfilename):
            files[file.rfilename] = file.size
    return HubRepository(repo_id, info.sha, files)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or not part for part in name.split("/"))


def _request_range(repo_id: str, revision: str, name: str, offset: int, num_bytes: int) -> bytes:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo_id, name, revision=revision)
    for attempt in range(1, NUM_TRIES + 1):
        try:
            return _request_once(url, offset, num_bytes)
        except Exception as error:
            if attempt == NUM_TRIES or not _is_transient(error):
                raise
            time.sleep(2**attempt / 4)
    raise AssertionError("the last attempt returns or raises")


def _request_once(url: str, offset: int, num_bytes: int) -> bytes:
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = {
        **build_hf_headers(library_name="qtool", library_version=__version__),
        "Range": f"bytes={offset}-{offset + num_bytes - 1}",
        "Accept-Encoding": "identity",  # ranges count the file's bytes, not compressed ones
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    data = bytearray()
    # Streamed: where a server ignores the range, the rest of a shard is not read.
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        ranged = response.status_code == 206
        if ranged or offset == 0:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= num_bytes:
                    break
    if len(data) < num_bytes:
        raise QtoolError(
            f"{url}: expected {num_bytes:,} bytes at offset {offset:,}, found {len(data):,}"
            + ("" if ranged else " (the server ignores range requests)"),
            kind="network",
            hint=ONLINE_HINT,
        )
    return bytes(data[:num_bytes])


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


# -- errors -------------------------------------------------------------------------------------


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_transport_error(error: BaseException) -> bool:
    # huggingface_hub brings httpx or, since 2.0, its successor; qtool depends on neither.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def _is_transient(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _is_transport_error(error) if status is None else status == 429 or status >= 500


def _translate(error: Exception, repo_id: str, revision: str | None) -> QtoolError | None:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            return _gated(repo_id)
        case RevisionNotFoundError():
            return _no_revision(repo_id, revision)
        case RepositoryNotFoundError():
            return _no_repository(repo_id, error.response.status_code)
        case HfHubHTTPError():
            return _from_status(error, repo_id)
        case HFValidationError():
            return _no_repository(repo_id, 404)
        case OfflineModeIsEnabled():
            return QtoolError(
                f"{repo_id}: no such local folder, not in the Hub cache, and HF_HUB_OFFLINE is set",
                kind="network",
                hint="unset HF_HUB_OFFLINE, or give a local folder",
            )
        case LocalEntryNotFoundError() if isinstance(error.__cause__, HfHubHTTPError):
            return _from_status(error.__cause__, repo_id)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return QtoolError(
                f"{repo_id}: no space left in the Hub cache",
                kind="no_space",
                hint="free some space and run the command again, or set HF_HOME to another disk",
            )
        case LocalEntryNotFoundError() | ConnectionError():
            return _unreachable(repo_id, error)
    return _unreachable(repo_id, error) if _is_transport_error(error) else None


def _unreachable(repo_id: str, error: Exception) -> QtoolError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return QtoolError(
        f"{repo_id}: no such local folder, and the Hub cannot be reached: {reason}",
        kind="network",
        hint=ONLINE_HINT,
    )


def _gated(repo_id: str) -> QtoolError:
    return QtoolError(
        f"{repo_id} is gated: the Hub gives its files only to accounts that were granted access",
        kind="auth",
        hint=f"ask for access at {_page(repo_id)}, then run `hf auth login` or set HF_TOKEN",
    )


def _no_revision(repo_id: str, revision: str | None) -> QtoolError:
    return QtoolError(
        f"{repo_id} has no revision {revision or 'main'!r}",
        kind="not_found",
        hint=f"branches, tags and commits are listed at {_page(repo_id)}/commits",
    )


def _no_repository(repo_id: str, status: int) -> QtoolError:
    if status in (401, 403):
        return QtoolError(
            f"{repo_id}: no such local folder, and no such model on the Hub that may be read "
            "without a valid login: it does not exist or is private",
            kind="auth",
            hint="check the name; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    return QtoolError(
        f"{repo_id}: no such local folder, and no such model on the Hub, or it is private",
        kind="not_found",
        hint=f"check the name at {_page('models')}?search={repo_id.rpartition('/')[2]}",
    )


def _from_status(error: Any, repo_id: str) -> QtoolError:
    status: int = error.response.status_code
    reason = error.server_message or str(error).strip().partition("\n")[0]
    if status in (401, 403):
        return QtoolError(
            f"{repo_id}: the Hub refuses access ({status}): {reason}",
            kind="auth",
            hint="log in with `hf auth login`, or set HF_TOKEN to a token that may read the model",
        )
    if status == 404:
        return QtoolError(
            f"{repo_id}: the Hub knows no {error.request.url.path}",
            kind="not_found",
            hint=f"see the model's files at {_page(repo_id)}/tree/main",
        )
    return QtoolError(
        f"{repo_id}: the Hub answers {status}: {reason}", kind="network", hint=ONLINE_HINT
    )


def _no_hub_answer(repo_id: str) -> QtoolError:
    return QtoolError(
        f"{repo_id}: expected the Hub's description of a model, found another answer",
        kind="network",
        hint=ONLINE_HINT,
    )


def _page(path: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{path}"
