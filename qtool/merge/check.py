"""The comparison of logits where this machine can run models, and one sentence where it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.errors import QtoolError
from qtool.events import Note, OnEvent
from qtool.merge.command import PlannedMerge
from qtool.runtime.requirements import require_run_extra

if TYPE_CHECKING:
    from qtool.merge.logits import LogitChange


def check_merge(planned: PlannedMerge, prompt: str, on_event: OnEvent) -> LogitChange | None:
    """How far the merged model is from the base with the adapter; None, and a warning, where that
    cannot be found out here: the folder is complete either way."""
    try:
        require_run_extra()
        from qtool.merge.logits import compare_logits

        return compare_logits(
            planned.request.output,
            planned.base.trained_on,
            planned.adapter.folder,
            prompt,
            quant=planned.base.trained_quant,
            on_event=on_event,
        )
    except QtoolError as error:
        text = f"the logits were not compared: {error.message}; {error.hint}"
        on_event(Note(text, "warning"))
        return None
