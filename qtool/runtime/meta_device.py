"""Models built on the meta device without computing there.

PyTorch loads its compiler and SymPy before it draws normal values, divides or asks how values lie
on that device: half a second for tensors that have no values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DRAWING: Final[frozenset[Callable[..., Any]]] = frozenset(
    {init.normal_, init.uniform_, init.kaiming_uniform_}
)


class WithoutMetaArithmetic(TorchFunctionMode):
    """Draws no values for tensors on the meta device, and counts in host memory instead.

    What models count up while they are built, for their frequencies, is small, and transformers
    makes it again once the weights are where they belong.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in DRAWING and (drawn := kwargs.get("tensor")) is not None and drawn.is_meta:
            return drawn
        if func is torch.arange and str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.empty_like and _devices(args, kwargs) == {"meta"}:
            # Room for what is in no file, such as an embedding that is stored as the output head.
            kwargs = {"memory_format": torch.contiguous_format, **kwargs}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            in_place = getattr(func, "__name__", "_").endswith("_")
            if in_place or _devices(args, kwargs) != {"cpu", "meta"}:
                raise
            # A number that was counted and another that has no value make one that has none.
            args, kwargs = tree_map_only(Tensor, _to_meta, (tuple(args), kwargs))
            return func(*args, **kwargs)


def _devices(*arguments: Any) -> set[str]:
    return {t.device.type for t in tree_leaves(arguments) if isinstance(t, Tensor)}


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
