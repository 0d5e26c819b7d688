"""Where the arithmetic runs: one small protocol, and the choice of who implements it.

A backend works on flat host arrays of one tile; it knows nothing of files, plans or models.
Every implementation gives the same bytes (see `qtool.formats` for the rules). Importing this
package loads no NumPy; `protocol` and the implementations do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from qtool.errors import Option

if TYPE_CHECKING:
    from qtool.backends.protocol import Backend

BackendChoice = Literal["auto", "cpu", "cuda"]


class ChosenBackend(NamedTuple):
    """A backend and the sentence that says why it was taken."""

    backend: Backend
    reason: str


def choose_backend(choice: BackendChoice = "auto") -> ChosenBackend:
    """The backend for this machine, with the reason, which the output shows.

    Nothing is loaded or claimed yet: that happens when the backend is first used.

    Raises:
        QtoolError: unsupported, if `cuda` was asked for and cannot run here.
    """
    from qtool.backends.cuda_driver import NoCudaError, cannot_run, find_cuda_device

    if choice == "cpu":
        return _cpu("asked for")
    try:
        device = find_cuda_device()
    except NoCudaError as error:
        if choice == "auto":
            return _cpu(f"auto: {error.reason}")
        raise cannot_run(Option("backend", "cuda"), error.reason, error.fix) from error
    from qtool.backends.cuda import CudaBackend

    reason = "asked for" if choice == "cuda" else "auto: it has a GPU"
    return ChosenBackend(CudaBackend(), f"{reason} ({device.name})")


def _cpu(reason: str) -> ChosenBackend:
    from qtool.backends.cpu import CpuBackend, describe_cpu

    return ChosenBackend(CpuBackend(), f"{reason} ({describe_cpu()})")
