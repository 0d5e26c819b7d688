"""Whether the Hub can be reached: asked once, before a library that would try again and again.

reason = why_unreachable("datasets/org/name")
if reason: with hub_left_alone(): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qtool.checkpoint.hub_errors import is_transport_error

TIMEOUT_S: Final = 10.0


def why_unreachable(repository: str) -> str | None:
    """What stands between here and the Hub; None where it answers, whatever it does.

    Args:
        repository: models/ORG/NAME or datasets/ORG/NAME.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().get(f"{constants.ENDPOINT}/api/{repository}", timeout=TIMEOUT_S)
    except Exception as error:
        if not is_transport_error(error):
            raise
        return str(error).partition("\n")[0] or type(error).__name__
    return None


@contextmanager
def hub_left_alone() -> Iterator[None]:
    """huggingface_hub asks for nothing meanwhile, as with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
