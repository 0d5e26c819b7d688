"""Which devices a model's weights go to.

One device when everything fits there; otherwise accelerate spreads the layers over GPUs, host
memory and disk, and moves what does not lie on a GPU there for each forward pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import accelerate
import torch

from qtool.backends.cuda_driver import SEE_DOCTOR, NoCudaError, cannot_run, find_gpu
from qtool.errors import Option, QtoolError
from qtool.runtime.memory_limits import no_such_gpu, parse_max_memory
from qtool.runtime.requirements import gpu_index

# Free GPU memory that is left for the KV cache, activations and one dequantized layer when the
# weights are placed without a word from the user.
RESERVED_BYTES: Final = 1 << 30


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
        return Placement(chosen, "sequential", limits, "placed by the limits that were given")
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
        raise no_such_gpu(unknown[0], str(chosen))
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
    index = gpu_index(device)
    if not num_gpus:
        raise cannot_run(Option("device", device), *why_no_gpu())
    if index >= num_gpus:
        raise QtoolError(
            (Option("device", device), f": PyTorch finds {num_gpus} GPU{'s' * (num_gpus != 1)}"),
            kind="usage",
            hint="they are counted from 0; `qtool doctor` shows them",
        )
    return torch.device("cuda", index)


def why_no_gpu() -> tuple[str, str]:
    """Why PyTorch has no GPU, and what helps."""
    try:
        name = find_gpu().name
    except NoCudaError as error:
        return error.reason, error.fix
    if torch.version.cuda is None:
        return f"{name} is there, PyTorch is built without CUDA", "install its build for CUDA"
    return f"{name} is there, PyTorch cannot use it", SEE_DOCTOR


def weights_by_device(model: Any, device: torch.device) -> dict[str, int]:
    """Bytes of the model's tensors by where they lie: "cuda:0", "cpu" or "disk"; `device` is where
    those of a model that is not spread do.
    """
    device_map = getattr(model, "hf_device_map", None) or {"": device}
    num_bytes: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        modules = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        place = next((device_map[it] for it in modules if it in device_map), device)
        num_bytes[_device_name(place)] += tensor.nbytes
    return dict(num_bytes)


def describe_devices(model: Any, placement: Placement) -> str:
    """ "cuda:0", or where the layers of a spread model went: "cuda:0 + cpu"."""
    device_map = getattr(model, "hf_device_map", None) or {"": placement.device}
    names = [_device_name(place) for place in device_map.values()]
    return " + ".join(sorted(set(names), key=names.index))


def _device_name(place: object) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)
