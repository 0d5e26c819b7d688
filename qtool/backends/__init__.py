"""Where the arithmetic runs: one small protocol, and the choice of who implements it.

A backend works on flat host arrays of one tile; it knows nothing of files, plans or models.
Every implementation gives the same bytes (see `qtool.formats` for the rules). Importing this
package loads no NumPy; `protocol` and the implementations do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from qtool.backends.protocol import Backend

BackendChoice = Literal["auto", "cpu"]


class ChosenBackend(NamedTuple):
    """A backend and the sentence that says why it was taken."""

    backend: Backend
    reason: str


def choose_backend(choice: BackendChoice = "auto") -> ChosenBackend:
    """The backend for this machine, with the reason, which the output shows."""
    from qtool.backends.cpu import CpuBackend, describe_cpu

    reason = "asked for" if choice == "cpu" else "auto: the kernels of this version run on the CPU"
    return ChosenBackend(CpuBackend(), f"{reason} ({describe_cpu()})")
