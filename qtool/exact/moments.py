"""Where a run on the meta device is: phase and module; and what the storages made there are for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from qtool.exact.bitsandbytes_layers import FourBitLinear, Int8Linear
from qtool.exact.records import Origin
from qtool.runtime.linear import Linear4bit, LinearInt8

PACKED_LAYERS: Final = (Linear4bit, LinearInt8, FourBitLinear, Int8Linear)
# What a packed layer makes by these is its output; all else in it is made from codes.
PRODUCTS: Final = frozenset({"mm", "bmm", "addmm", "cat"})


class Moments:
    """Follows the modules that run.

    `phase` is set by whoever drives the run: "prefill", "backward".
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.phase = ""
        self.name_modules(model)
        self._running: list[nn.Module] = []
        self._vocab_size = vocab_size
        self.filling_cache = False

    def name_modules(self, model: nn.Module) -> None:
        """Learn the names of `model`'s modules, anew where some were replaced."""
        self._names = {id(module): name for name, module in model.named_modules()}

    def place(self) -> str:
        """Phase and innermost module."""
        running = self._names.get(id(self._running[-1]), "") if self._running else ""
        return f"{self.phase} {running}".rstrip()

    def classify(self, operator: Any, tensor: Tensor) -> Origin:
        """What a storage made now is for."""
        if self.filling_cache:
            return "kv_cache"
        if self.phase == "optimizer":
            return "optimizer"
        if not tensor.is_floating_point() and not self._running:
            return "other"
        if tensor.ndim and tensor.shape[-1] == self._vocab_size:
            return "logits"
        if self._running and isinstance(self._running[-1], PACKED_LAYERS):
            return (
                "activations" if operator.__name__.split(".")[0] in PRODUCTS else "dequant_buffer"
            )
        return "activations"

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While the model runs inside."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Checkpointing abandons a layer that it runs anew as soon as it has what it needs.
        while self._running and self._running.pop() is not module:
            pass
