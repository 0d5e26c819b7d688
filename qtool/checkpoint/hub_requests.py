"""Requests to the Hub about one model: its description and parts of its files, counted.

They go through huggingface_hub's HTTP client, shared and kept alive, and so honour HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE and proxies. Of huggingface_hub only this client is imported: the module
of its API alone takes longer to load than the memory of a model to plan.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from qtool import __version__
from qtool.checkpoint.file_source import Traffic
from qtool.checkpoint.hub_errors import (
    ONLINE_HINT,
    is_transport_error,
    no_hub_answer,
    status_of,
)
from qtool.errors import QtoolError

RETRY_WAITS_S: Final = (0.5, 1.0)
MAX_WAIT_S: Final = 20  # if the server asks for more patience than that, it is an error
LIST_TIMEOUT_S: Final = 30
# Where huggingface_hub looks for a token, beside its file.
TOKEN_VARIABLES: Final = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"})
MAX_DESCRIPTION_BYTES: Final = 64_000_000

Answer = TypeVar("Answer")


class HubRequests:
    """Reads of one model's description and files; several threads may call the methods at once.

    Raises:
        HFValidationError: no model can have this id.
    """

    def __init__(self, repo_id: str) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(repo_id)
        self._repo_id = repo_id
        self._endpoint: str = constants.ENDPOINT
        self._timeout_s: float = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._headers = _default_headers()
        self._locations: dict[str, str] = {}  # file -> where the Hub sent its last reader
        self._start_s = time.perf_counter()
        self._lock = threading.Lock()
        self._num_requests = self._num_bytes = 0

    @property
    def traffic(self) -> Traffic:
        """What the requests cost so far, redirects and failed ones included."""
        seconds = time.perf_counter() - self._start_s
        return Traffic(self._num_requests, self._num_bytes, seconds)

    def fetch_description(self, revision: str | None) -> dict[str, Any]:
        """The Hub's description of the model: its commit, its files and their sizes."""
        url = f"{self._endpoint}/api/models/{self._repo_id}"
        if revision is not None:
            url += f"/revision/{quote(revision, safe='')}"
        url += "?blobs=true"
        _, data = _retried(
            lambda: self._get(url, max_bytes=MAX_DESCRIPTION_BYTES, timeout_s=LIST_TIMEOUT_S),
            _is_busy,
        )
        try:
            description = json.loads(data)
        except ValueError as error:
            raise no_hub_answer(self._repo_id) from error
        if not isinstance(description, dict):
            raise no_hub_answer(self._repo_id)
        return description

    def fetch_start(self, revision: str | None, name: str, max_bytes: int) -> tuple[str, bytes]:
        """The commit that `revision` is and the beginning of a file of it; no second try."""
        url = self._url_of(revision or "main", name)
        response, data = self._get(url, max_bytes=max_bytes, timeout_s=self._timeout_s)
        commits = [answer.headers.get("x-repo-commit") for answer in (response, *response.history)]
        return next(filter(None, commits), ""), data[:max_bytes]

    def fetch_range(self, revision: str, name: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of the file from `offset` on; QtoolError(network) where fewer come."""

        def is_transient(error: Exception) -> bool:
            is_short = isinstance(error, QtoolError)
            # What a file was redirected to holds for some time only.
            was_redirected = self._locations.pop(name, None) is not None
            return _is_busy(error) or is_transport_error(error) or is_short or was_redirected

        return _retried(lambda: self._get_range(revision, name, offset, num_bytes), is_transient)

    def _get_range(self, revision: str, name: str, offset: int, num_bytes: int) -> bytes:
        url = self._locations.get(name) or self._url_of(revision, name)
        end = offset + num_bytes
        # A range counts the file's bytes, not compressed ones.
        headers = {"Range": f"bytes={offset}-{end - 1}", "Accept-Encoding": "identity"}
        response, data = self._get(url, headers, max_bytes=end, timeout_s=self._timeout_s)
        if response.status_code != 206:  # the server sends the file from its first byte on
            data = data[offset:]
        if len(data) < num_bytes:
            raise QtoolError(
                f"{self._url_of(revision, name)}: expected {num_bytes:,} bytes at offset "
                f"{offset:,}, found {len(data):,}",
                kind="network",
                hint=ONLINE_HINT,
            )
        if response.history:
            self._locations[name] = str(response.url)
        return data[:num_bytes]

    def _get(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int,
        timeout_s: float,
    ) -> tuple[Any, bytes]:
        """The last response and its body, of which little more than `max_bytes` is read."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            get_session,
            hf_raise_for_status,
        )

        sent = {**self._headers, **(headers or {})}
        if not url.startswith(f"{self._endpoint}/"):
            sent.pop("authorization", None)
        data = bytearray()
        with get_session().stream("GET", url, headers=sent, timeout=timeout_s) as response:
            try:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > max_bytes:
                        break  # only then: a connection is kept if its reply was read to the end
            finally:
                with self._lock:
                    self._num_requests += 1 + len(response.history)
                    self._num_bytes += response.num_bytes_downloaded
        return response, bytes(data)

    def _url_of(self, revision: str, name: str) -> str:
        return f"{self._endpoint}/{self._repo_id}/resolve/{quote(revision, safe='')}/{quote(name)}"


def _default_headers() -> dict[str, str]:
    # build_hf_headers would look for installed packages, and ask the Hub for a list of agents.
    token = _find_token()
    agent = {"user-agent": f"qtool/{__version__}"}
    return agent | ({"authorization": f"Bearer {token}"} if token else {})


def _find_token() -> str | None:
    """The user's token; what huggingface_hub imports to read one is spared where there is none."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    has_variable = not TOKEN_VARIABLES.isdisjoint(os.environ)
    in_notebook = "IPython" in sys.modules  # Colab keeps tokens of its own
    if not has_variable and not in_notebook and not Path(constants.HF_TOKEN_PATH).exists():
        return None
    from huggingface_hub.utils import get_token  # type: ignore[attr-defined]

    token: str | None = get_token()
    return token


def _retried(get: Callable[[], Answer], is_transient: Callable[[Exception], bool]) -> Answer:
    for wait_s in RETRY_WAITS_S:
        try:
            return get()
        except Exception as error:
            asked_s = _asked_wait_s(error)
            if not is_transient(error) or asked_s > MAX_WAIT_S:
                raise
            time.sleep(max(wait_s, asked_s))
    return get()


def _is_busy(error: Exception) -> bool:
    status = status_of(error)
    return status is not None and (status == 429 or status >= 500)


def _asked_wait_s(error: Exception) -> int:
    """How long the server asks to wait: "Retry-After: 5", or "RateLimit: "api";r=0;t=5"."""
    if not _is_busy(error):
        return 0
    headers = getattr(error, "response").headers  # noqa: B009
    text = headers.get("retry-after") or headers.get("ratelimit", "").rpartition("t=")[2]
    return int(text) if text.isdecimal() else 0
