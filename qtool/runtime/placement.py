"""Which devices a model's weights go to.

One device when everything fits there; otherwise accelerate spreads the layers over GPUs, host
memory and disk, and moves what does not lie on a GPU there for each forward pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import accelerate
import torch

from qtool.backends.cuda_driver import SEE_DOCTOR, NoCudaError, cannot_run, find_gpu
from qtool.errors import Option, QtoolError

# Free GPU memory that is left for the KV cache, activations and one dequantized layer when the
# weights are placed without a word from the user.
RESERVED_BYTES: Final = 1 << 30
SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
MAX_MEMORY_EXAMPLE: Final = "0=6GiB,cpu=20GiB"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to load to.

    Args:
        device: where inputs go and the first layer computes.
        device_map: for transformers: {"": device}, or "sequential" to spread.
        max_memory: bytes per GPU index or "cpu", where the weights are spread.
        reason: one sentence for the user; empty where there is nothing to say.
    """

    device: torch.device
    device_map: dict[str, str] | str
    max_memory: dict[int | str, int] | None = None
    reason: str = ""

    @property
    def reading_device(self) -> torch.device:
        """Where tensors are read to: host memory if transformers is to spread them."""
        return self.device if self.max_memory is None else torch.device("cpu")


def choose_placement(device: str, max_memory: str | None, weights_bytes: int) -> Placement:
    """Decide from what the user said.

    Args:
        device: auto, cpu, cuda or cuda:N.
        max_memory: "0=6GiB,cpu=20GiB" or None.
        weights_bytes: what the loaded weights will take.

    Raises:
        QtoolError: malformed limits, and what `resolve_device` raises.
    """
    chosen = resolve_device(device)
    if max_memory is not None:
        limits = read_limits(max_memory, chosen)
        return Placement(chosen, "sequential", limits, "spread by the limits that were given")
    if chosen.type == "cuda" and device == "auto":
        free_bytes, _ = torch.cuda.mem_get_info(chosen)
        if weights_bytes + RESERVED_BYTES > free_bytes:
            return Placement(
                chosen, "sequential", _all_memory(), "too large for one GPU, so spread"
            )
    return Placement(chosen, {"": str(chosen)})


def _all_memory() -> dict[int | str, int]:
    """What accelerate may use of each GPU and of host memory."""
    limits: dict[int | str, int] = accelerate.utils.get_max_memory()
    return {
        place: max(free_bytes - RESERVED_BYTES, 0) if isinstance(place, int) else free_bytes
        for place, free_bytes in limits.items()
    }


def read_limits(max_memory: str, chosen: torch.device) -> dict[int | str, int]:
    """The limits for a model that runs on `chosen`: bytes per GPU index or "cpu".

    Raises:
        QtoolError: usage, for malformed ones and for a GPU that is not there.
    """
    limits = parse_max_memory(max_memory)
    num_gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    unknown = [place for place in limits if isinstance(place, int) and place >= num_gpus]
    if unknown:
        raise QtoolError(
            (Option("max_memory"), f" names GPU {unknown[0]}, but the model runs on {chosen}"),
            kind="usage",
            hint=("without a GPU give host memory only: ", Option("max_memory", "cpu=20GiB")),
        )
    return limits


def parse_max_memory(text: str) -> dict[int | str, int]:
    """ "0=6GiB,cpu=20GiB" -> {0: 6 * 2**30, "cpu": 20 * 2**30}; GB is 10^9, GiB 2^30."""
    limits: dict[int | str, int] = {}
    for entry in text.split(","):
        place, equals, size = entry.partition("=")
        place = place.strip().removeprefix("cuda:")
        match = SIZE.fullmatch(size)
        if not equals or not match or not (place == "cpu" or place.isdecimal()):
            raise QtoolError(
                (
                    Option("max_memory", text),
                    f": {entry!r} is not of the form GPU=SIZE or cpu=SIZE",
                ),
                kind="usage",
                hint=("for example ", Option("max_memory", MAX_MEMORY_EXAMPLE)),
            )
        number, unit, binary = match.groups()
        scale = (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
        limits[int(place) if place != "cpu" else "cpu"] = int(float(number) * scale)
    return limits


def resolve_device(device: str) -> torch.device:
    """The device of that name; makes no CUDA context.

    Raises:
        QtoolError: unsupported, where no GPU can be used; usage for other names that there are not.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", 0) if num_gpus else torch.device("cpu")
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise QtoolError(
            (Option("device", device), ": there is no such device"),
            kind="usage",
            hint="use auto, cpu, cuda or cuda:N",
        )
    index = int(match.group(1) or 0)
    if not num_gpus:
        raise cannot_run(Option("device", device), *_why_no_gpu())
    if index >= num_gpus:
        raise QtoolError(
            (Option("device", device), f": PyTorch finds {num_gpus} GPU{'s' * (num_gpus != 1)}"),
            kind="usage",
            hint="they are counted from 0; `qtool doctor` shows them",
        )
    return torch.device("cuda", index)


def _why_no_gpu() -> tuple[str, str]:
    """Why PyTorch has no GPU, and what helps."""
    try:
        name = find_gpu().name
    except NoCudaError as error:
        return error.reason, error.fix
    if torch.version.cuda is None:
        return f"{name} is there, PyTorch is built without CUDA", "install its build for CUDA"
    return f"{name} is there, PyTorch cannot use it", SEE_DOCTOR


def describe_devices(model: Any, placement: Placement) -> str:
    """ "cuda:0", or where the layers of a spread model went: "cuda:0 + cpu"."""
    device_map = getattr(model, "hf_device_map", None) or {"": placement.device}
    names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()]
    return " + ".join(sorted(set(names), key=names.index))
