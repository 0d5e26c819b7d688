"""The model that is trained: loaded by our own loader, with adapters or with all weights trainable.

What is not packed keeps the dtype that products are computed in: embeddings, norms and head are
frozen and gain nothing from float32, which PEFT's prepare_model_for_kbit_training would give them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from peft import LoraConfig

from qtool.checkpoint.config_json import CONFIG_NAME
from qtool.checkpoint.records import Checkpoint
from qtool.checkpoint.weight_files import SINGLE_FILE
from qtool.errors import Option, QtoolError
from qtool.events import OnEvent
from qtool.finetune.lora_layers import wrap_with_lora
from qtool.finetune.lora_targets import choose_layers
from qtool.finetune.plan import PlannedRun, local_rank, num_processes
from qtool.finetune.records import FinetuneRequest
from qtool.finetune.trainer import Placement
from qtool.formats.precisions import ComputeDtype, QuantizedPrecision
from qtool.optim import keep_embeddings_32bit
from qtool.runtime.loading import LoadedModel, LoadOptions, load_model
from qtool.runtime.placement import resolve_device

SHORT_NAMES: Final[dict[str, ComputeDtype]] = {"fp32": "float32", "bf16": "bfloat16"}


def choose_placement(request: FinetuneRequest) -> Placement:
    """One device for this process, and what it computes in.

    Raises:
        QtoolError: a device that is not there, or a dtype that it cannot train in.
    """
    device = _one_device(request.device)
    asked = request.training.compute_dtype
    is_cuda = device.type == "cuda"
    if asked == "float16" and not is_cuda:
        raise QtoolError(
            (Option("compute_dtype", "float16"), " trains on GPUs only"),
            kind="unsupported",
            hint=Option("compute_dtype", "bfloat16"),
        )
    if asked is None:
        has_bfloat16 = not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bfloat16" if has_bfloat16 else "float16"
    return Placement(device, asked)


def load_base(planned: PlannedRun, place: Placement, on_event: OnEvent) -> LoadedModel:
    """The model with its weights on `place`, packed on its way in where the plan says so."""
    options = LoadOptions(
        quant=cast(QuantizedPrecision | None, planned.loads_quant),
        compute_dtype=weights_dtype(planned.request, place),
        device=str(place.device),
    )
    return load_model(planned.request.model, options, on_event=on_event)


def weights_dtype(request: FinetuneRequest, place: Placement) -> ComputeDtype:
    """What unpacked weights are held in.

    Where all of them are trained in float16, whose gradients are scaled, they must be float32.
    """
    if request.method != "full":
        return place.compute_dtype
    master = SHORT_NAMES[request.training.master_dtype]
    return "float32" if place.compute_dtype != "bfloat16" else master


def make_trainable(
    network: Any, request: FinetuneRequest, checkpoint: Checkpoint
) -> tuple[Any, int]:
    """The network with what `request` trains, and how many parameters that are.

    Raises:
        QtoolError: targets that the model does not have, or that PEFT refuses.
    """
    transformers.set_seed(request.training.seed)  # adapters begin at random
    network.config.use_cache = False
    if request.method == "full":
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        keep_embeddings_32bit(network)
    else:
        network = _with_adapters(network, request, checkpoint)
    return network, sum(p.numel() for p in network.parameters() if p.requires_grad)


def base_name(checkpoint: Checkpoint, request: FinetuneRequest) -> str:
    """What an adapter calls its base: the Hub id without the revision, or the whole path, since an
    adapter is used from other folders, where PEFT would take a part of one for a Hub id.
    """
    if checkpoint.location == "hub":
        return checkpoint.id
    place = Path(request.model).expanduser().resolve()
    return str(place.parent if place.name in (SINGLE_FILE, CONFIG_NAME) else place)


def _with_adapters(network: Any, request: FinetuneRequest, checkpoint: Checkpoint) -> Any:
    lora = request.lora
    network.requires_grad_(False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=choose_layers(network, lora.targets),
        use_rslora=lora.rslora,
    )
    try:
        wrapped = wrap_with_lora(network, config)
    except ValueError as error:  # PEFT has rules of its own about layers of some models
        first_line = str(error).strip().partition("\n")[0]
        raise QtoolError(
            f"PEFT refuses LoRA on layers of {type(network).__name__}: {first_line}",
            kind="unsupported",
            hint=("name other layers with ", Option("lora_targets")),
        ) from error
    made = wrapped.peft_config["default"]
    # A folder here: with a Hub id PEFT would look the base up there at each save.
    assert checkpoint.folder is not None
    made.base_model_name_or_path = str(checkpoint.folder.resolve())
    if isinstance(made.target_modules, set):  # whose order is another in each process
        made.target_modules = sorted(made.target_modules)
    wrapped.create_or_update_model_card = _write_no_card
    if lora.dtype == "bf16":
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return wrapped


def _write_no_card(folder: str) -> None:
    """PEFT's says nothing of the run; the manifest does."""


def _one_device(device: str) -> torch.device:
    """This process's; all other GPUs are hidden from it, lest the Trainer spread the model over
    them."""
    if device == "cpu" or not torch.cuda.is_available():
        return resolve_device(device)
    if num_processes() > 1:
        return torch.device("cuda", local_rank())
    found = resolve_device(device)
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = names.split(",") if names else [str(n) for n in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[found.index or 0].strip()
        found = torch.device("cuda", 0)
    return found
