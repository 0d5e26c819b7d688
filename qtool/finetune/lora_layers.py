"""LoRA over packed layers: what PEFT makes of them when it is told to.

    model = wrap_with_lora(model, LoraConfig(target_modules="all-linear"))
    model = load_lora(model, folder)

Adapters are PEFT's own in every respect: folders saved here load in PEFT over any base, and the
other way round. PEFT's default layer runs over packed layers too, more slowly; it cannot merge.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.finetune.lora_function import COMPUTE_DTYPES, lora_linear
from qtool.finetune.lora_targets import check_lora_targets
from qtool.runtime.linear import Linear4bit, LinearInt8

# Kinds of LoRA, as PEFT keys them, that leave the base weight alone or read it dequantized.
_VARIANTS: Final = frozenset({(), ("use_dora",), ("alora_invocation_tokens",)})
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def wrap_with_lora(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> Any:
    """`model` as a PeftModel whose packed layers train adapters through `lora_linear`.

    Args:
        model: changed in place; only the new adapter is trainable.
        config: what to adapt; our layers are registered with it.
        autocast_adapter_dtype: adapters of 16-bit models are float32, as PEFT's default is.

    Raises:
        QtoolError: what `check_lora_targets` refuses.
    """
    check_lora_targets(model, config)
    register_packed_layers(config)
    return get_peft_model(
        model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )


def load_lora(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> Any:
    """`model` as a PeftModel with the adapter in `folder`, whoever trained it over whatever base.

    Raises:
        QtoolError: what `check_lora_targets` refuses.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        check_lora_targets(model, config)
        register_packed_layers(config)
    return PeftModel.from_pretrained(
        model, str(folder), adapter_name, is_trainable=is_trainable, config=config
    )


def register_packed_layers(config: LoraConfig) -> None:
    """Have PEFT make `QLoraLinear` of packed layers; said in no file, so for each config anew."""
    config._register_custom_module({Linear4bit: QLoraLinear, LinearInt8: QLoraLinear})


class QLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed one: faster where it is plain, and it merges.

    Merging dequantizes, adds in float32 and packs again in the same format, which rounds: the
    merged layer is as close to the sum as the packed one was to its own weight. The bytes from
    before stay in host memory until `unmerge` puts them back, so that nothing is lost.
    """

    base_layer: Any  # Linear4bit or LinearInt8; nn.Linear declares that it has a bias
    _before: dict[str, Tensor] | None = None  # what was packed before the first merge

    @property
    def fan_in_fan_out(self) -> bool:
        """Packed weights are [out, in], even for models that keep them the other way round."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass  # PEFT sets what the config says, which was written for the model's own layers

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Those of PEFT that work over packed weights; it refuses others by this list."""
        return {key: kind for key, kind in super().lora_variants.items() if key in _VARIANTS}

    # -- products -------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out): one step of autograd for plain LoRA, PEFT's chain else."""
        name = None if args or kwargs else self._plain_adapter(x)
        if name is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        dropout = self.lora_dropout[name]
        return lora_linear(
            x,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.base_layer,
            scaling=self.scaling[name],
            dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter that is active here, if nothing but its two products is asked for."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged:
            return None
        name, base = active[0], self.base_layer
        dropout = self.lora_dropout[name]
        parts: tuple[Any, ...] = (base, self.lora_A[name], self.lora_B[name], dropout)
        is_plain = (
            name not in self.lora_variant
            and type(x) is Tensor
            and x.dtype in COMPUTE_DTYPES
            and not _is_compiling()
            and type(parts[1]) is type(parts[2]) is nn.Linear
            and getattr(parts[2], "bias", None) is None
            and _is_dropout(dropout)
            and (base.bias is None or not base.bias.requires_grad)
            and x.device == base.weight.device == parts[1].weight.device == parts[2].weight.device
            and not any(_is_watched(part) for part in parts)
        )
        return name if is_plain else None

    # -- merging --------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the packed weight; all of them to the weight from before any merge.

        Args:
            safe_merge: no other than without: values that are not finite are always refused, and
                leave the layer as it was.
            adapter_names: None merges those that are active.

        Raises:
            QtoolError: bad_file, where the sum is not finite; unsupported, for DoRA with another
                adapter and for weights that are not on a device now.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base = self.base_layer
        self._refuse_to_merge([*self.merged_adapters, *names])
        current = _copies(base.packed_tensors()) if self.merged else None
        before = self._before or self._packed_on_host()
        base.set_packed(before)
        try:
            weight = base.decode_rows(slice(0, base.out_features), torch.float32)
            bias = before.get("bias")
            for name in [*self.merged_adapters, *names]:
                weight = self._add_adapter(name, weight)
                if bias is not None and self.lora_B[name].bias is not None:
                    bias = bias + self.lora_B[name].bias.detach().to(bias) * self.scaling[name]
            self._take(weight, bias)
        except BaseException:
            base.set_packed(before if current is None else current)
            raise
        self._before = before
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put back, byte for byte, what was packed before the first merge."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.set_packed(self._before)
        if "bias" in self._before:
            self.base_layer.bias.data.copy_(self._before["bias"])
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)  # PEFT's, of DoRA
        self.merged_adapters.clear()
        self._before = None

    def _packed_on_host(self) -> dict[str, Tensor]:
        parts = self.base_layer.packed_tensors()
        if self.base_layer.bias is not None:
            parts["bias"] = self.base_layer.bias.detach()
        return {name: part.to("cpu", copy=True) for name, part in parts.items()}

    @torch.no_grad()
    def _add_adapter(self, name: str, weight: Tensor) -> Tensor:
        """float32 (out, in), `weight` itself where that is possible."""
        if name in self.lora_variant:
            merged: Tensor = self.lora_variant[name].merge_safe(self, name, weight)
            return merged
        a, b = (matrix[name].weight.to(weight) for matrix in (self.lora_A, self.lora_B))
        return weight.addmm_(b, a, alpha=self.scaling[name])

    def _take(self, weight: Tensor, bias: Tensor | None) -> None:
        broken = QtoolError(
            f"{self._place()}: merging gives values that are not finite",
            kind="bad_file",
            hint="the adapter is broken: train it again with a lower learning rate",
        )
        if bias is not None and not torch.isfinite(bias).all():
            raise broken
        try:
            self.base_layer.requantize(weight)
        except QtoolError as error:
            raise broken from error
        if bias is not None:
            self.base_layer.bias.data.copy_(bias)

    def _refuse_to_merge(self, names: list[str]) -> None:
        base = self.base_layer
        if base.weight.is_meta:
            raise QtoolError(
                f"{self._place()} is offloaded, and cannot be merged there",
                kind="unsupported",
                hint="load the model without a limit of memory, on the CPU if need be",
            )
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            raise QtoolError(
                f"{self._place()}: DoRA scales the whole weight, and merges with no other adapter",
                kind="unsupported",
                hint="merge it alone",
            )
        if base.bias is None and any(self.lora_B[name].bias is not None for name in names):
            raise QtoolError(
                f"{self._place()}: the adapter has a bias and the layer has none to add it to",
                kind="unsupported",
                hint="train with lora_bias=False, or keep the adapter apart",
            )

    def _place(self) -> str:
        kwargs: dict[str, Any] = getattr(self, "kwargs", {})
        return str(kwargs.get("target_name") or type(self.base_layer).__name__)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return text.replace("lora.", "qtool.", 1)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (type(module) is nn.Dropout and module.p < 1)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`: hooks, Accelerate's too."""
    return hasattr(module, "_hf_hook") or any(getattr(module, hooks) for hooks in _HOOKS)


def _is_compiling() -> bool:
    return torch.compiler.is_compiling()


def _copies(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in parts.items()}
