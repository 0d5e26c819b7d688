"""What must be there before a model can run, said in one sentence if it is not.

Imports nothing heavy: what is missing is told at once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.backends.cuda_driver import NoCudaError, cannot_run, find_driver
from qtool.errors import Option, QtoolError, Words, in_a_row, naming
from qtool.formats.precisions import QuantFormat, QuantizedPrecision
from qtool.runtime.prompts import NO_TEMPLATE, no_chat_template, refuse_system

if TYPE_CHECKING:
    from qtool.architecture import Architecture
    from qtool.checkpoint.records import Checkpoint

RUN_PACKAGES: Final = ("torch", "transformers", "accelerate")
FINETUNE_PACKAGES: Final = ("trl", "peft", "datasets")
NO_GPU: Final = "CUDA graphs need an NVIDIA GPU"
NO_CUPY: Final = "the fused kernels need CuPy"
OLDEST_TRANSFORMERS: Final = (5, 10)  # older releases follow hostile paths and names in checkpoints


def require_run_extra() -> None:
    """Raise QtoolError with the command that installs what is missing."""
    missing = [name for name in RUN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise QtoolError(
            f"running models needs {in_a_row(missing)}, not installed here",
            kind="unsupported",
            hint='pip install "qtool[run]"',
        )
    try:
        found = version("transformers")
    except PackageNotFoundError:  # a source tree on the path: let it speak for itself
        return
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRANSFORMERS:
        raise QtoolError(
            f"transformers {found} is too old, expected 5.10 or later",
            kind="unsupported",
            hint='pip install --upgrade "qtool[run]"',
        )


def require_device(device: str) -> None:
    """The same for a device: a name that is none, a GPU without a driver. PyTorch knows the rest.

    Raises:
        QtoolError: usage, or unsupported.
    """
    if device in ("auto", "cpu"):
        return
    gpu_index(device)
    try:
        find_driver()
    except NoCudaError as error:
        raise cannot_run(Option("device", device), error.reason, error.fix) from error


def require_path(path: str, device: str, model: str) -> None:
    """The same for a way to run `model` that there is with a GPU alone, or with CuPy on one.

    Raises:
        QtoolError: unsupported.
    """
    if path == "fused" and device.startswith("cuda") and importlib.util.find_spec("cupy") is None:
        raise cannot_take(model, path, NO_CUPY)
    if path != "graph":
        return
    try:
        find_driver()
    except NoCudaError as error:
        raise cannot_take(model, path, NO_GPU) from error
    if device == "cpu":
        raise cannot_take(model, path, NO_GPU)


def cannot_take(who: str, path: str, why: str, said_by: str | Option | None = None) -> QtoolError:
    """The error for a path that was asked for, and that `who` has not."""
    return QtoolError(
        f"{who} cannot take the {path} path: {why}",
        kind="unsupported",
        hint=("leave out ", said_by or Option("path"), ": the fastest way that works is taken"),
    )


def require_model(model: str, quant: QuantizedPrecision | None = None) -> Checkpoint:
    """The same for MODEL: its headers are read, on the Hub too, and packing to `quant` planned.

    No weights are downloaded. What is wrong with the model that only transformers knows is for
    `model_config.require_runnable` to say, of what is returned.

    Raises:
        QtoolError: what `open_checkpoint` and `quantize_on_load` raise.
    """
    checkpoint = _open_headers(model)
    if quant is None:
        return checkpoint
    from qtool.architecture import build_architecture
    from qtool.quantize.plan import Recipe, plan_tensors, refuse_quantized_source

    refuse_quantized_source(checkpoint, if_packed=as_packed(quant))
    recipe = Recipe(format=QuantFormat(quant))
    with naming(checkpoint.id):
        architecture = build_architecture(checkpoint.config)
    if architecture.experts is not None:
        raise packed_mixture(checkpoint.id, architecture, _as_stored(quant))
    with naming(checkpoint.id):
        plan_tensors(checkpoint.tensors.values(), architecture, recipe)
    return checkpoint


def _open_headers(model: str) -> Checkpoint:
    """Where MODEL is an adapter's folder, the next step names its base."""
    from qtool.checkpoint.open import open_checkpoint

    try:
        return open_checkpoint(model, need="headers", need_weights=True)
    except QtoolError as error:
        base = _base_of_adapter(Path(model)) if error.kind == "unsupported" else None
        if base is None:
            raise
        adapter = Option("adapter", model)
        hint = (f"give its base model, {base}; generate takes the adapter beside it: ", adapter)
        raise error.with_hint(hint) from error


def _base_of_adapter(folder: Path) -> str | None:
    """What the adapter_config.json of a folder names; None where there is none that says."""
    from qtool.checkpoint.adapter_files import read_adapter_files

    try:
        base = read_adapter_files(folder).config.get("base_model_name_or_path")
    except (QtoolError, OSError):
        return None
    return base if isinstance(base, str) and base else None


def as_packed(quant: str) -> Words:
    """The next step for a packed model that was to run in `quant`."""
    return (*_as_stored(quant), ", or give the full-precision model")


def _as_stored(quant: str) -> tuple[str | Option, ...]:
    return ("leave out ", Option("quant", quant), " to run it as it is stored")


def packed_mixture(model: str, architecture: Architecture, hint: Words) -> QtoolError:
    """The error for a mixture of experts that was to be packed."""
    assert architecture.experts is not None
    return QtoolError(
        f"{model}: config.json: {architecture.class_name} is a mixture of "
        f"{architecture.experts.num_experts} experts per layer, whose packed experts do not run",
        kind="unsupported",
        hint=hint,
    )


def require_fusable(checkpoint: Checkpoint, fused_types: Collection[str]) -> None:
    """The same for the fused path, which there is for blocks of `fused_types`.

    Raises:
        QtoolError: unsupported.
    """
    from qtool.architecture import KNOWN_MODEL_TYPES

    model_type = checkpoint.config.get("model_type")
    if model_type in KNOWN_MODEL_TYPES and model_type not in fused_types:
        why = f"{model_type} blocks have no fused kernels"
        raise cannot_take(checkpoint.id, "fused", why)


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """The same for a tokenizer, as far as names of files tell; the rest is for transformers to say.

    Raises:
        QtoolError: not_found.
    """
    from qtool.runtime.tokenizer_files import lacks_tokenizer

    if lacks_tokenizer(checkpoint):
        raise QtoolError(
            f"{checkpoint.id}: no usable tokenizer: there is none among its files",
            kind="not_found",
            hint="tokenizer.json and tokenizer_config.json belong into the model's folder",
        )


def require_chat(checkpoint: Checkpoint, *, chat: bool | None, system: str | None) -> None:
    """The same for a chat that was asked for, of a model whose files hold no chat template.

    Raises:
        QtoolError: usage.
    """
    from qtool.runtime.tokenizer_files import lacks_chat_template

    is_asked_for = chat or (chat is None and system is not None)
    if is_asked_for and lacks_chat_template(checkpoint):
        raise no_chat_template() if chat else refuse_system(NO_TEMPLATE)


def made_for(checkpoint: Checkpoint) -> int | None:
    """How many tokens; None without a limit, or where transformers alone knows the model type."""
    from qtool.architecture import build_architecture

    try:
        return build_architecture(checkpoint.config).max_context
    except QtoolError:
        return None


def require_context(checkpoint: Checkpoint, max_context: int | None) -> None:
    """The same for a limit of prompt and answer beyond what the model was made for.

    Raises:
        QtoolError: usage.
    """
    if max_context is None:
        return
    longest = made_for(checkpoint)
    if longest is not None and max_context > longest:
        raise beyond_context(max_context, longest)


def beyond_context(max_context: int, longest: int) -> QtoolError:
    """The error for a limit of `max_context` tokens, above the `longest` of the model."""
    return QtoolError(
        (Option("max_context", max_context), f": the model was made for {longest:,} tokens"),
        kind="usage",
        hint=(Option("max_context", longest), " or less"),
    )


def gpu_index(device: str) -> int:
    """The N of cuda:N, 0 for cuda; QtoolError (usage) for other names."""
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise QtoolError(
            (Option("device", device), ": there is no such device"),
            kind="usage",
            hint="use auto, cpu, cuda or cuda:N",
        )
    return int(match.group(1) or 0)


def require_finetune_extra() -> None:
    """The same for training."""
    missing = [name for name in FINETUNE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise QtoolError(
            f"fine-tuning needs {in_a_row(missing)}, not installed here",
            kind="unsupported",
            hint='pip install "qtool[finetune]"',
        )
    require_run_extra()


def require_peft() -> None:
    """The same for adapters."""
    if importlib.util.find_spec("peft") is None:
        raise QtoolError(
            (Option("adapter"), " needs peft, not installed here"),
            kind="unsupported",
            hint="pip install peft",
        )


def require_bitsandbytes() -> None:
    """The same for the rival that a measurement was asked to have."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QtoolError(
            (Option("against", "bitsandbytes"), " needs bitsandbytes, not installed here"),
            kind="unsupported",
            hint=("pip install bitsandbytes, or leave out ", Option("against")),
        )
