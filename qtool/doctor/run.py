"""All checks, in the order they are shown; whatever one of them raises becomes its `fail` line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from qtool.doctor import gpu, hub, machine, model, packages, round_trip
from qtool.doctor.records import Check

CheckFunction = Callable[[], Iterable[Check]]


def run_checks(model_name: str | None = None) -> Iterator[tuple[str, Check]]:
    """Yield (section, check) pairs as the checks are made; never raises an Exception.

    Args:
        model_name: a local folder or Hub id whose settings are looked at too.
    """
    smi = gpu.ask_nvidia_smi()
    for section, name, function in _all_checks(smi, model_name):
        try:
            for check in function():
                yield section, check
        except Exception as error:
            yield section, _broken(name, error)


def _all_checks(
    smi: gpu.NvidiaSmi, model_name: str | None
) -> Iterator[tuple[str, str, CheckFunction]]:
    """(section, name for the line if the check itself breaks, function)."""
    yield "Software", "packages", packages.check_packages
    yield "Machine", "cpu", machine.check_cpu
    yield "Machine", "memory", machine.check_memory
    yield "Machine", "disk", machine.check_disk
    yield "GPU", "gpu", partial(gpu.check_gpus, smi)
    yield "GPU", "torch", partial(gpu.check_torch_build, smi)
    yield "GPU", "cupy", partial(gpu.check_cupy, smi)
    yield "Hub", "hub", hub.check_hub
    if model_name is not None:
        yield "Model", "model", partial(model.check_model, model_name, smi)
    for backend in round_trip.BACKENDS:
        yield "Round trip", backend, partial(round_trip.check_round_trip, backend)


def _broken(name: str, error: Exception) -> Check:
    return Check(
        name,
        "fail",
        f"the check itself failed: {type(error).__name__}: {error}",
        "see the message; QTOOL_DEBUG=1 with the verb that matters to you shows a traceback",
    )
