"""What the Hub and the way to it can answer instead of a model, as errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from qtool.errors import QtoolError

ONLINE_HINT: Final = "check the connection, HF_ENDPOINT and proxies, and run the command again"
RATE_LIMIT_HINT: Final = (
    "wait some minutes; requests with a login (`hf auth login`, or HF_TOKEN) have a higher limit"
)


class NoSuchModel(QtoolError):
    """No folder of that name, and no model on the Hub either, as far as can be told."""


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


def is_transport_error(error: BaseException) -> bool:
    """Whether the HTTP client raised it: no connection, a broken one, no answer in time."""
    # huggingface_hub brings httpx or, since 2.0, its successor; qtool depends on neither.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the error is about, if it is about an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def no_hub_answer(repo_id: str) -> QtoolError:
    """The error for an answer that no Hub gives, as from a network's login page."""
    return QtoolError(
        f"{repo_id}: expected the Hub's description of a model, found another answer",
        kind="network",
        hint=ONLINE_HINT,
    )


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
            return NoSuchModel(
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
    return _unreachable(repo_id, error) if is_transport_error(error) else None


def _unreachable(repo_id: str, error: Exception) -> QtoolError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return NoSuchModel(
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
        return NoSuchModel(
            f"{repo_id}: no such local folder, and no such model on the Hub that may be read "
            "without a valid login: it does not exist or is private",
            kind="auth",
            hint="check the name; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    return NoSuchModel(
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
    hint = RATE_LIMIT_HINT if status == 429 else ONLINE_HINT
    return QtoolError(f"{repo_id}: the Hub answers {status}: {reason}", kind="network", hint=hint)


def _page(path: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{path}"
