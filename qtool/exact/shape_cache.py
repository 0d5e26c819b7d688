"""Results of operators on the meta device, remembered by the shapes that went in.

Most operators work out their output's shape in Python there, in up to a millisecond; the layers of
a model ask for the same ones over and over. Those that only change values have nothing to do.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

# In-place operators that leave shapes alone and return their first argument, or nothing (foreach).
VALUES_ONLY: Final = frozenset(
    {"add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_", "sqrt_", "neg_", "fill_"}
    | {"zero_", "copy_", "masked_fill_", "clamp_", "clamp_min_", "uniform_", "normal_"}
)

# Shape, strides and dtype of each output.
_Outputs = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]


_Kind = Literal["functional", "values", "other"]


class ShapeCache:
    """Calls operators; those that only make new tensors run once per combination of arguments."""

    def __init__(self) -> None:
        self._outputs: dict[Any, _Outputs] = {}
        self._kinds: dict[Any, _Kind] = {}

    def call(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `operator` returns."""
        kind = self._kinds.get(operator)
        if kind is None:
            kind = self._kinds[operator] = _kind(operator)
        if kind == "values" and not _has_host_tensor(args):
            return args[0] if operator._schema.returns else None
        key = _key(operator, args, kwargs) if kind == "functional" else None
        if key is None:
            return operator(*args, **kwargs)
        outputs = self._outputs.get(key)
        if outputs is not None:
            made = tuple(None if output is None else _empty(*output) for output in outputs)
            return made if len(operator._schema.returns) > 1 else made[0]
        result = operator(*args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        if kind == "functional" and not _can_be_made_anew(parts, args):
            self._kinds[operator] = "other"  # `_unsafe_view`, which does not own up to its alias
        elif kind == "functional":
            self._outputs[key] = tuple(
                None if part is None else (part.shape, part.stride(), part.dtype) for part in parts
            )
        return result


def _kind(operator: Any) -> _Kind:
    name = operator._schema.name.removeprefix("aten::")
    if name.removeprefix("_foreach_") in VALUES_ONLY:
        return "values"
    makes_new = not operator._schema.is_mutable and not any(
        output.alias_info for output in operator._schema.returns
    )
    return "functional" if makes_new else "other"


def _key(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    key = (operator, _described(args), _described(tuple(kwargs.items())))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _can_be_made_anew(results: Any, args: Any) -> bool:
    """Whether all results are tensors on the meta device, with storages of their own."""
    given = {part.untyped_storage()._cdata for part in tree_iter(args) if isinstance(part, Tensor)}
    return all(
        result is None
        or (
            isinstance(result, Tensor)
            and result.is_meta
            and result.untyped_storage()._cdata not in given
        )
        for result in results
    )


def _has_host_tensor(args: Any) -> bool:
    first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
    return not first.is_meta


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, tuple | list):
        return tuple(_described(part) for part in value)
    return (type(value), value)  # 1 and 1.0 promote differently


def _empty(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
