"""PEFT adapters over packed layers.

Our layers are nn.Linear to PEFT, so LoRA and its kin wrap them as they wrap any linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from qtool.errors import Option, QtoolError
from qtool.runtime.requirements import require_peft

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"


def add_adapter(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` into the layers of `model`, for inference.

    Raises:
        QtoolError: no adapter there, one of a kind that changes no layers, or one made for another
            model.
    """
    require_peft()
    from peft import PeftConfig, PeftModel

    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise QtoolError(
                f"{folder} holds no {name}",
                kind="not_found",
                hint=(
                    Option("adapter"),
                    " wants the folder of a PEFT adapter saved as safetensors",
                ),
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise QtoolError(
                f"{folder}: {config.peft_type} adapters learn a prompt, not weights",
                kind="unsupported",
                hint="LoRA and other adapters of linear layers run here",
            )
        wrapped = PeftModel(model, config)
        result = wrapped.load_adapter(str(folder), "default", is_trainable=False)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _mismatch(folder, str(error)) from error
    if result.missing_keys:
        raise _mismatch(folder, f"the adapter lacks {min(result.missing_keys)}")
    if result.unexpected_keys:
        raise _mismatch(folder, f"the model has no place for {min(result.unexpected_keys)}")
    model.eval()


def _mismatch(folder: Path, detail: str) -> QtoolError:
    return QtoolError(
        f"{folder}: the adapter does not fit the model: {detail}",
        kind="bad_file",
        hint=f"base_model_name_or_path in {folder / CONFIG_NAME} names the model it was made for",
    )
