"""Can models be fetched: the Hub's endpoint, the variables that steer it, the access token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qtool.doctor.records import Check

TIMEOUT_S: Final = 4.0


def check_hub() -> Iterator[Check]:
    """Whether the Hub answers and knows the token; local folders work without both."""
    from huggingface_hub import constants, get_token

    token = get_token()
    if constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set: only models that are cached already"
        yield Check("hub", "info", found, "unset it to fetch others")
    else:
        yield _check_endpoint(constants.ENDPOINT)
    if token is None:
        fix = "for gated models: hf auth login, or set HF_TOKEN"
        yield Check("token", "info", "none; public models need none", fix)
    elif constants.HF_HUB_OFFLINE:
        yield Check("token", "ok", "present (not tried, offline)")
    else:
        yield _check_token(constants.ENDPOINT, token)


def hub_home() -> Path:
    """Where downloads go: HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def _check_endpoint(endpoint: str) -> Check:
    """Any answer below 500 means that the way there is open."""
    from huggingface_hub import get_session

    try:
        response = get_session().get(f"{endpoint}/api/models?limit=1", timeout=TIMEOUT_S)
    except Exception as error:  # the HTTP library's own; which one differs between versions
        found = f"{endpoint} does not answer: {_first_line(error)}"
        return Check("hub", "warn", found, _REACH_FIX)
    if response.status_code >= 500:
        return Check("hub", "warn", f"{endpoint} answers {response.status_code}", "try again later")
    return Check("hub", "ok", f"{endpoint} answers")


_REACH_FIX: Final = (
    "check network and proxy (HTTPS_PROXY), use a mirror (HF_ENDPOINT), "
    "or work on local folders (HF_HUB_OFFLINE=1)"
)


def _check_token(endpoint: str, token: str) -> Check:
    from huggingface_hub import get_session

    try:
        headers = {"authorization": f"Bearer {token}"}
        url = f"{endpoint}/api/whoami-v2"
        status = get_session().get(url, headers=headers, timeout=TIMEOUT_S).status_code
    except Exception:  # the line above says that the endpoint does not answer
        status = 0
    if status == 200:
        return Check("token", "ok", "present and accepted")
    if status in (401, 403):
        return Check("token", "warn", "present, but the Hub refuses it", "hf auth login")
    return Check("token", "info", "present; could not be tried")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
