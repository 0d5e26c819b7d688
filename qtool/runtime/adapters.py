"""PEFT adapters over packed layers.

Our layers are nn.Linear to PEFT, so LoRA and its kin wrap them as they wrap any linear layer.
`split_adapter` takes such a layer apart for kernels that do LoRA themselves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qtool.checkpoint.adapter_files import (
    CONFIG_NAME,
    PREFIX,
    AdapterFiles,
    find_adapter,
    read_adapter_files,
)
from qtool.errors import QtoolError
from qtool.events import OnEvent, ignore_events
from qtool.runtime.bitsandbytes_logging import quiet_bitsandbytes
from qtool.runtime.requirements import require_peft


def fetch_adapter(adapter: str | Path, on_event: OnEvent = ignore_events) -> Path:
    """The folder of ADAPTER, a folder or a Hub id with an optional @REVISION, downloaded at need.

    Raises:
        QtoolError: peft is missing, which is said before anything is fetched; what `find_adapter`
            raises.
    """
    require_peft()
    return find_adapter(adapter, on_event).folder


def check_adapter(folder: Path) -> AdapterFiles:
    """Read what can be known of the adapter in `folder` without its model.

    Raises:
        QtoolError: no adapter there, a damaged one, or one of a kind that changes no layers.
    """
    require_peft()
    files = read_adapter_files(folder)
    config = _read_config(folder)
    if config.is_prompt_learning:
        raise QtoolError(
            f"{folder}: {config.peft_type} adapters learn a prompt, not weights",
            kind="unsupported",
            hint="LoRA and other adapters of linear layers run here",
        )
    return files


def add_adapter(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` into the layers of `model`, for inference.

    Raises:
        QtoolError: what `check_adapter` raises, or that it was made for another model.
    """
    files = check_adapter(folder)
    try:
        with quiet_bitsandbytes():  # PEFT imports it where it is installed
            result = _load_adapter(model, folder, files)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _mismatch(folder, _misplaced(model, files, str(error)) or str(error)) from error
    if result.missing_keys:
        raise _mismatch(folder, f"the adapter lacks {min(result.missing_keys)}")
    if result.unexpected_keys:
        raise _mismatch(folder, f"the model has no place for {min(result.unexpected_keys)}")
    model.eval()


def _read_config(folder: Path) -> Any:
    try:
        with quiet_bitsandbytes():
            from peft import PeftConfig

            return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise QtoolError(
            f"{folder / CONFIG_NAME}: PEFT cannot read it: {type(error).__name__}: {first_line}",
            kind="bad_file",
            hint="restore the file as PEFT wrote it, or `pip install -U peft`",
        ) from error


def _load_adapter(model: Any, folder: Path, files: AdapterFiles) -> Any:
    """PEFT's word on which keys were missing or too many."""
    from peft import PeftModel

    wrapped = PeftModel(model, _read_config(folder))
    _check_shapes(wrapped, folder, files)
    return wrapped.load_adapter(str(folder), "default", is_trainable=False)


def _check_shapes(wrapped: Any, folder: Path, files: AdapterFiles) -> None:
    """Name the first tensor that does not fit; PEFT's own error has a line for each of them."""
    from peft import get_peft_model_state_dict

    places = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    for tensor in files.tensors:
        if tensor.name in places and tuple(places[tensor.name].shape) != tensor.shape:
            expected, found = list(places[tensor.name].shape), list(tensor.shape)
            raise _mismatch(folder, f"{tensor.name}: expected shape {expected}, found {found}")


def _misplaced(model: Any, files: AdapterFiles, said: str) -> str | None:
    """The first layer that the adapter is for and `model` lacks, beside what PEFT `said`, which
    may be about what it takes for that layer."""
    modules = {name for name, _ in model.named_modules()}
    for tensor in files.tensors:
        module = tensor.name.removeprefix(PREFIX).partition(".lora_")[0]
        if ".lora_" in tensor.name and module not in modules:
            first_line = said.strip().partition("\n")[0]
            return f"the model has no {module} (PEFT: {first_line})"
    return None


# -- what kernels are told ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adapter adds to a linear layer: scale * (x @ a.T) @ b.T.

    Args:
        a: (rank, in_features), of PEFT's dtype; not a copy.
        b: (out_features, rank), the same.
        scale: alpha / r, or what rank-stabilized LoRA makes of them.
    """

    a: Tensor
    b: Tensor
    scale: float


class OtherAdapter(Exception):
    """An adapter that is more than a `LowRank`, in a few words."""


def split_adapter(layer: nn.Module) -> tuple[nn.Module, LowRank | None]:
    """A layer without its adapter, and what the adapter adds; None where nothing is added.

    Raises:
        OtherAdapter: it changes the layer in another way.
    """
    if not is_peft_layer(layer):
        return layer, None
    from peft.tuners.lora.layer import Linear

    if not isinstance(layer, Linear):
        raise OtherAdapter(f"a layer is peft's {type(layer).__name__}")
    base: nn.Module = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return base, None
    if len(names) > 1:
        raise OtherAdapter("a layer has several adapters at once")
    (name,) = names
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        raise OtherAdapter(f"its adapter is {variant}, not plain LoRA")
    if layer.lora_bias.get(name):
        raise OtherAdapter("its adapter has biases")
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return base, LowRank(a.detach(), b.detach(), float(layer.scaling[name]))


def is_peft_layer(module: nn.Module) -> bool:
    """Whether PEFT has put `module` in the place of a model's own."""
    if "peft" not in sys.modules:  # then nobody has
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _mismatch(folder: Path, detail: str) -> QtoolError:
    return QtoolError(
        f"{folder}: the adapter does not fit the model: {detail}",
        kind="bad_file",
        hint=f"base_model_name_or_path in {folder / CONFIG_NAME} names the model it was made for",
    )
