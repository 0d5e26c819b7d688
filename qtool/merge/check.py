"""The comparison of logits where this machine can run models, and one sentence where it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qtool.errors import Option, QtoolError, Words
from qtool.events import Event, Note, OnEvent
from qtool.merge.command import PlannedMerge
from qtool.quantize.memory import PeakMemory
from qtool.runtime.requirements import require_run_extra

if TYPE_CHECKING:
    from qtool.merge.logits import LogitChange

# Of the adapter's own effect on the logits: what is off by as much is hardly the trained model.
LITTLE_KEPT: Final = 0.5


@dataclass(frozen=True, slots=True)
class LogitCheck:
    """`change` is None where the models cannot be run; the memory is as merging counts its own."""

    change: LogitChange | None
    peak_host_bytes: int


def check_merge(planned: PlannedMerge, prompt: str, on_event: OnEvent) -> LogitCheck:
    """How far the merged model is from the base with the adapter; no change, and a warning, where
    that cannot be found out here: the folder is complete either way."""
    memory = PeakMemory(planned.chosen.backend)

    def watched(event: Event) -> None:
        memory.sample()
        on_event(event)

    change = _compare(planned, prompt, watched, memory)
    return LogitCheck(change, memory.peak_bytes)


def _compare(
    planned: PlannedMerge, prompt: str, on_event: OnEvent, memory: PeakMemory
) -> LogitChange | None:
    try:
        require_run_extra()
        from qtool.merge.logits import compare_logits

        change = compare_logits(
            planned.request.output,
            planned.base.trained_on,
            planned.adapter.folder,
            prompt,
            quant=planned.base.trained_quant,
            on_event=on_event,
            look=memory.sample,
        )
        if change.adapter and change.merging >= LITTLE_KEPT * change.adapter:
            on_event(Note(_little_kept(planned, change), "warning"))
        return change
    except QtoolError as error:
        text = f"the logits were not compared: {error.message}; {error.hint}"
        on_event(Note(text, "warning"))
        return None


def _little_kept(planned: PlannedMerge, change: LogitChange) -> Words:
    """What is wrong with the folder, and what to do instead."""
    base, quant = planned.base, planned.quant_plan
    ways: list[str | Option] = []
    if quant is not None:
        ways += ["merge to 16 bit (without ", Option("quant"), "), or "]
        if base.onto == "dequantized":
            ways += ["take ", Option("onto", "original"), ", or "]
    elif (
        base.onto == "original"
        and base.trained_quant is None
        and base.trained_on != base.checkpoint.id
    ):
        ways += [
            "merge onto what it was trained against, ",
            Option("base", base.trained_on),
            ", or ",
        ]
    packing = f" --quant {base.trained_quant}" if base.trained_quant else ""
    share = change.merging / change.adapter
    other = base.onto == "original" and base.trained_quant is not None
    why = f" (it was trained beside {base.trained_quant} weights)" if other else ""
    return (
        f"the merged model is not what the adapter makes of its base{why}: its logits are off by "
        f"{share:.0%} of what that moves them; ",
        *ways,
        "leave the adapter beside its base: `qtool generate "
        f"{base.trained_on}{packing} --adapter {planned.request.adapter}`",
    )
