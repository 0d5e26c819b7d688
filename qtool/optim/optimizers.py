"""AdamW, Adam, Lion and SGD with momentum as `torch.optim.Optimizer`s with 8-bit states.

    optimizer = AdamW8bit(model.parameters(), lr=1e-4)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

The rules are in `qtool.optim.reference`. Parameters may be on several devices and of several
dtypes; what a class leaves out of its constructor it does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from qtool.errors import QtoolError
from qtool.formats.optimizer_states import BLOCKSIZE
from qtool.optim.bitsandbytes import NESTED_KEY
from qtool.optim.device import DeviceBatch
from qtool.optim.host import HostBatch
from qtool.optim.members import Member
from qtool.optim.rules import Algorithm, Hyperparameters
from qtool.optim.states import (
    ParameterState,
    bits_of,
    empty_state,
    new_states,
    state_names,
    step_counters,
)

# Paged states that are fetched at once. Where the device has too little room for all, those of the
# next batch push out the last one's, not each other.
PAGED_BATCH_VALUES: Final = 1 << 27


class EightBitOptimizer(Optimizer):
    """What the optimizers share: states, batches of parameters, saving and loading.

    Args:
        defaults: of the options of a group, with `lr` and `weight_decay`.
        paged: keep large states in managed memory, which moves to the host when the GPU is full.
    """

    algorithm: ClassVar[Algorithm]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, paged: bool) -> None:
        self._batches: list[DeviceBatch | HostBatch] = []
        # ids of the parameters and states that batches were made of, and keep
        self._seen: tuple[list[int], list[int]] = ([], [])
        self._waiting: list[Tensor] = []  # for their first gradient
        super().__init__(params, defaults)
        self._paged = paged
        if paged and not torch.cuda.is_available():
            raise QtoolError(
                "paged states need an NVIDIA GPU, and PyTorch finds none",
                kind="unsupported",
                hint="take the optimizer without Paged in its name",
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in `torch.optim`.

        Raises:
            ValueError: an option is out of its range.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` does.

        On a GPU the work is only queued, on the current stream. From the second step on it may be
        captured in a CUDA graph; a learning rate that is to change between replays must be a
        float32 tensor on the GPU.

        Raises:
            QtoolError: a parameter or gradient that no kernel can take.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = [self._settings(group) for group in self.param_groups]
        self._gather()
        for batch in self._batches:
            batch.step(settings)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` of the same class gave; states are copied to the devices.

        Raises:
            ValueError: its groups are others.
            QtoolError: its states are not those of such an optimizer and such parameters.
        """
        saved = state_dict["state"]
        # PyTorch's own would convert the states to the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        pairs = [
            (p, saved[n]) for n, p in zip(numbers, self._parameters(), strict=True) if n in saved
        ]
        counters = step_counters((int(state["step"]), p.device) for p, state in pairs)
        for (parameter, state), counter in zip(pairs, counters, strict=True):
            self.state[parameter] = self._loaded(parameter, state) | {"step": counter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle."""
        super().__setstate__(state)
        self.__dict__.setdefault("_paged", False)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle or copy: without what belongs to this process."""
        return super().__getstate__() | {"_paged": self._paged}

    # -- what a class defines ---------------------------------------------------------------------

    def _settings(self, group: dict[str, Any]) -> Hyperparameters:
        beta1, beta2 = group["betas"]
        return Hyperparameters(
            group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"]
        )

    # -- batches ----------------------------------------------------------------------------------

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _forget(self) -> None:
        """Make batches anew at the next step."""
        self._batches, self._seen, self._waiting = [], ([], []), []

    def _gather(self) -> None:
        """Give states to parameters that have their first gradient, and make batches anew then."""
        if self._identities() == self._seen and all(
            parameter.grad is None for parameter in self._waiting
        ):
            return
        without = [p for p in self._parameters() if p.numel() and not self.state.get(p)]
        ready = [parameter for parameter in without if parameter.grad is not None]
        states = new_states(ready, self.algorithm, paged=self._paged)
        for parameter, state in zip(ready, states, strict=True):
            self.state[parameter] = state
        self._waiting = [parameter for parameter in without if parameter.grad is None]
        self._seen = self._identities()
        self._batches = self._new_batches()

    def _identities(self) -> tuple[list[int], list[int]]:
        """`state` is everybody's to change: who clears it begins anew, as with PyTorch's own.

        Without looking parameters up in it: that takes longer than all else the host does.
        """
        return list(map(id, self._parameters())), list(map(id, self.state.values()))

    def _new_batches(self) -> list[DeviceBatch | HostBatch]:
        members: dict[Any, list[Member]] = {}
        paged_values = 0
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if not self.state.get(parameter):
                    continue
                member = Member(parameter, self.state[parameter], number)
                if self._paged:
                    paged_values += parameter.numel()
                chunk = paged_values // PAGED_BATCH_VALUES
                key: Any = parameter.device.type
                if key != "cpu":
                    key = (parameter.device, parameter.dtype, bits_of(member.state), chunk)
                members.setdefault(key, []).append(member)
        return [self._batch(batch) for batch in members.values()]

    def _batch(self, members: Sequence[Member]) -> DeviceBatch | HostBatch:
        if members[0].parameter.device.type == "cpu":
            return HostBatch(self.algorithm, members)
        return DeviceBatch(self.algorithm, members, paged=self._paged)

    # -- loading ----------------------------------------------------------------------------------

    def _loaded(self, parameter: Tensor, saved: ParameterState) -> ParameterState:
        """Copies of the tensors of `saved` where `parameter` is, but for the step."""
        if NESTED_KEY in saved:
            raise QtoolError(
                "the state dict is bitsandbytes'",
                kind="usage",
                hint="convert it: load_state_dict(from_bitsandbytes(state_dict, AdamW8bit))",
            )
        names = state_names(self.algorithm, bits_of(saved))
        if set(saved) != set(names):
            raise QtoolError(
                f"a saved state has {', '.join(sorted(saved)) or 'nothing'}; "
                f"{type(self).__name__} has {', '.join(names)}",
                kind="usage",
                hint="load it into an optimizer of the class that saved it",
            )
        return {
            name: self._copied(parameter, name, saved[name]) for name in names if name != "step"
        }

    def _copied(self, parameter: Tensor, name: str, saved: Tensor) -> Tensor:
        is_absmax = name.startswith("absmax")
        blocks = (-(-parameter.numel() // BLOCKSIZE),)
        shape = blocks if is_absmax else tuple(parameter.shape)
        if tuple(saved.shape) != shape:
            raise QtoolError(
                f"a saved {name} has shape {tuple(saved.shape)}; the parameter wants {shape}",
                kind="usage",
                hint="give the optimizer the same parameters in the same order",
            )
        if is_absmax:
            return saved.to(parameter.device, copy=True)
        is_plain = saved.is_contiguous() and parameter.is_contiguous()
        if not is_plain and saved.stride() != parameter.stride():
            raise QtoolError(
                f"a saved {name} of shape {shape} lies in memory by strides {saved.stride()}, the "
                f"parameter by {parameter.stride()}; blocks of 256 would be others",
                kind="usage",
                hint="load the state before the model's memory format changes",
            )
        return empty_state(parameter, saved.dtype, paged=self._paged).copy_(saved)


class AdamW8bit(EightBitOptimizer):
    """AdamW with decoupled weight decay.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; a tensor too.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment; 1 at most.
        weight_decay: times the learning rate, the share that parameters lose per step.
        paged: see `EightBitOptimizer`.

    Raises:
        ValueError: an option is out of its range.
    """

    algorithm = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, paged=paged)


class Adam8bit(AdamW8bit):
    """Adam: AdamW without weight decay unless it is asked for. It is decoupled, too."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        paged: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, paged=paged)


class Lion8bit(EightBitOptimizer):
    """Lion: steps of one size in the direction of a mean of gradients. One state.

    Args:
        betas: of the mean whose sign is the direction, and of the mean that is kept.
        weight_decay: decoupled, as in AdamW.
    """

    algorithm = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        paged: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, paged=paged
        )


class SGD8bit(EightBitOptimizer):
    """SGD with momentum, neither dampened nor Nesterov's. One state.

    Args:
        weight_decay: times the parameter, added to the gradient, as in `torch.optim.SGD`.
    """

    algorithm = "momentum"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        paged: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, paged=paged
        )

    def _settings(self, group: dict[str, Any]) -> Hyperparameters:
        return Hyperparameters(group["lr"], group["momentum"], weight_decay=group["weight_decay"])


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit(paged=True)`: large states move to the host when the GPU is full."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, paged=True)


class PagedAdam8bit(Adam8bit):
    """`Adam8bit(paged=True)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, paged=True)


class PagedLion8bit(Lion8bit):
    """`Lion8bit(paged=True)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, paged=True)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError unless the options of a group are in their ranges."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} values; it must be one")
    ranges = {"lr": lr, "weight_decay": group["weight_decay"]}
    for name, value in ranges.items():
        if not float(cast(float, value)) >= 0:
            raise ValueError(f"{name} is {float(value)}; it must not be negative")
    betas = group.get("betas", (group.get("momentum", 0.0),))
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas or momentum of {beta}; they must be in [0, 1)")
    if not 0 <= group.get("eps", 0.0) <= 1:
        raise ValueError(f"eps is {group['eps']}; it must be in [0, 1]")
