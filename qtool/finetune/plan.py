"""Before anything is loaded: the method and the precision, the plan of `estimate`, and the verdict.

planned = plan_run(request, checkpoint, max_length=1024)
planned.require_fit()
"""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qtool.backends.cuda_driver import cannot_run
from qtool.checkpoint.records import Checkpoint
from qtool.errors import Option, QtoolError
from qtool.finetune.records import DEFAULT_MAX_LENGTH, FinetuneRequest
from qtool.planner.estimate import EstimateRequest, estimate_opened
from qtool.planner.gpus import HOST_VENDOR, Gpu, gpu_of, list_gpus
from qtool.planner.lora import ALL_LINEAR, HEADS, target_layers
from qtool.planner.model import PlannedModel, describe_model
from qtool.planner.optimizers import find_optimizer
from qtool.planner.records import Estimate, MemoryPlan, Tuning, Workload
from qtool.planner.units import GIB, MIB
from qtool.runtime.requirements import gpu_index

DEFAULT_QUANT: Final = "nf4-dq"
DRIVER: Final = "libcuda.so.1"
DRIVER_FILE: Final = Path("/dev/nvidiactl")  # that the library opens
HOST_NAME: Final = "this machine's memory"


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What will be trained, on what, and what that takes.

    Args:
        loads_quant: what the model is packed to on its way in; None loads it as it is stored.
        estimate: one plan, on the device that will train if that is known.
    """

    request: FinetuneRequest
    model: PlannedModel
    loads_quant: str | None
    max_length: int
    estimate: Estimate
    gpu: Gpu | None

    @property
    def plan(self) -> MemoryPlan:
        """The memory of one process."""
        return self.estimate.plans[0]

    @property
    def quant(self) -> str | None:
        """The base's precision where it is packed."""
        return self.loads_quant or self.model.stored_precision

    @property
    def is_known(self) -> bool:
        """Whether more than the weights is counted in the plan."""
        return "activations" in self.plan.components

    @property
    def fits(self) -> bool:
        """Whether there is no reason to stop."""
        return not self.is_known or all(fit.verdict != "no" for fit in self.plan.fits)

    def require_fit(self) -> None:
        """Raise QtoolError (no_fit), with what would fit, unless it fits or is forced."""
        if self.fits or self.request.force:
            return
        plan, [answer, *_] = self.plan, self.plan.fits
        changes = ", or ".join(suggestion.change for suggestion in plan.suggestions)
        raise QtoolError(
            f"training needs {plan.peak_bytes / GIB:,.2f} GiB at its peak, and "
            f"{answer.usable_bytes / GIB:,.2f} GiB of {answer.gpu.name} can be used",
            kind="no_fit",
            hint=(
                f"fits with {changes}" if changes else "no single change makes it fit",
                "; ",
                Option("force"),
                " tries all the same",
            ),
        )


def plan_run(request: FinetuneRequest, checkpoint: Checkpoint) -> PlannedRun:
    """Choose and plan; pure but for asking the machine what it has.

    Raises:
        QtoolError: options that contradict the model or each other.
    """
    _check_device(request)
    model = describe_model(checkpoint)
    loads_quant = _check_method(request, model)
    max_length = _choose_length(request, model)
    training, lora = request.training, request.lora
    architecture = model.architecture
    if lora.targets is not None and request.method != "full":
        _refuse_heads(lora.targets)
        if architecture is not None:
            body = {n: t for n, t in architecture.tensors.items() if t.module_name not in HEADS}
            target_layers(replace(architecture, tensors=body), lora.targets)
    workload = Workload(
        context=max_length,
        batch=training.batch,
        mode=request.method,
        tuning=Tuning(
            lora_r=lora.r,
            lora_targets=lora.targets,
            lora_dropout=lora.dropout,
            adapter_dtype=lora.dtype,
            optimizer=training.optimizer,
            gradient_checkpointing=training.gradient_checkpointing,
        ),
    )
    gpu = _training_device(request.device)
    asked = EstimateRequest(
        model=request.model,
        quants=(_planned_quant(request, model, loads_quant),),
        context=max_length,
        workload=workload,
    )
    estimate = estimate_opened(model, (gpu,) if gpu else (), asked)
    return PlannedRun(request, model, loads_quant, max_length, estimate, gpu)


def _planned_quant(request: FinetuneRequest, model: PlannedModel, loads_quant: str | None) -> str:
    is_float32 = request.training.master_dtype == "fp32"
    unpacked = "fp32" if request.method == "full" and is_float32 else "bf16"
    return loads_quant or model.stored_precision or unpacked


def _check_method(request: FinetuneRequest, model: PlannedModel) -> str | None:
    """What to pack the model to while loading; raises where method, model and quant disagree."""
    method, quant, stored = request.method, request.quant, model.stored_precision
    if method == "qlora":
        if stored is None:
            _refuse_packing_experts(model)
            _refuse_packing_unknown(model)
            return quant or DEFAULT_QUANT
        if quant is not None and quant != stored:
            raise QtoolError(
                (f"{model.id} is quantized already ({stored}), and ", Option("quant", quant)),
                kind="usage",
                hint=("leave out ", Option("quant"), ", or give the full-precision model"),
            )
        return None
    if stored is not None or quant is not None:
        what = f"{model.id} is packed ({stored})" if stored else Option("quant", quant)
        trains = "trains all weights" if method == "full" else "wants a 16-bit base"
        raise QtoolError(
            (Option("method", method), f" {trains}, and packed ones are not: ", what),
            kind="usage",
            hint=(Option("method", "qlora"), ", or the full-precision model"),
        )
    return None


def _choose_length(request: FinetuneRequest, model: PlannedModel) -> int:
    asked = request.data.max_length
    made_for = model.architecture.max_context if model.architecture else None
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, made_for or DEFAULT_MAX_LENGTH)
    if made_for is not None and asked > made_for:
        raise QtoolError(
            (
                Option("max_length", asked),
                f": {model.id} was made for {made_for:,} tokens (max_position_embeddings)",
            ),
            kind="usage",
            hint=(Option("max_length", made_for), " is the longest"),
        )
    return asked


def _refuse_heads(targets: tuple[str, ...]) -> None:
    for name in targets:
        if name.rpartition(".")[2] in HEADS:
            raise QtoolError(
                (
                    Option("lora_targets", ",".join(targets)),
                    f": {name} is the output head, whose loss is computed from its weight alone, "
                    "so an adapter on it would never be trained",
                ),
                kind="usage",
                hint=(Option("lora_targets", ALL_LINEAR), ", or names without it"),
            )


def _refuse_packing_experts(model: PlannedModel) -> None:
    experts = model.architecture.experts if model.architecture else None
    if experts is not None:
        raise QtoolError(
            (
                f"{model.id} is a mixture of {experts.num_experts} experts per layer, and ",
                Option("method", "qlora"),
                " would pack them into what nothing runs",
            ),
            kind="unsupported",
            hint=(Option("method", "lora"), " trains over the 16-bit model"),
        )


def _refuse_packing_unknown(model: PlannedModel) -> None:
    if model.why_unknown is not None:
        raise QtoolError(
            (
                f"{model.id}: which of its layers ",
                Option("method", "qlora"),
                f" would pack is not known: {model.why_unknown.message}",
            ),
            kind="unsupported",
            hint=(Option("method", "lora"), " trains the 16-bit model, if transformers knows it"),
        )


# -- the device -----------------------------------------------------------------------------------


def _check_device(request: FinetuneRequest) -> None:
    """What would be found out in vain once PyTorch is loaded and the plan is shown.

    Raises:
        QtoolError: unsupported, where there is no GPU; usage, for a device that cannot be, that
            cannot do what is asked, or that all processes of a launch would share.
    """
    device, optimizer = request.device, request.training.optimizer
    if device not in ("auto", "cpu"):
        gpu_index(device)
    if ":" in device and num_processes() > 1:
        raise QtoolError(
            (Option("device", device), f": each of {num_processes()} processes takes its own GPU"),
            kind="usage",
            hint=("leave out ", Option("device"), "; CUDA_VISIBLE_DEVICES says which there are"),
        )
    reason = _why_no_gpu(device)
    if device.startswith("cuda") and reason:
        raise cannot_run(Option("device", device), reason)
    found = find_optimizer(optimizer)
    if found.is_paged and reason:
        raise QtoolError(
            (Option("optimizer", optimizer), f" keeps states in a GPU's memory: {reason}"),
            kind="usage" if device == "cpu" else "unsupported",
            hint=Option("optimizer", found.name.removeprefix("paged-")),
        )


def _why_no_gpu(device: str) -> str:
    """Why training cannot be on a GPU; empty where it may be, so that PyTorch has to be asked.

    That alone counts GPUs: nvidia-smi may be missing, and knows neither GPUs whose memory is the
    host's nor the parts that MIG makes of one.
    """
    if device == "cpu":
        return "training is on the CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    return "" if _may_have_driver() else "no NVIDIA driver was found"


def _may_have_driver() -> bool:
    """Whether its library is there, or PyTorch may know where it lies.

    It is not started: it reads CUDA_VISIBLE_DEVICES once, and that is set for each process later.
    """
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return DRIVER_FILE.exists()
    return True


def num_processes() -> int:
    """How many train together, on all machines, under `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of the processes of this machine this is, under `accelerate launch`."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _training_device(device: str) -> Gpu | None:
    """The GPU that this process will train on, or the host; None where its memory is not known."""
    if _why_no_gpu(device):
        return _host()
    try:
        listed = list_gpus()
    except QtoolError:
        # PyTorch may find one without nvidia-smi.
        return _host() if shutil.which("nvidia-smi") else None
    if all(gpu.total_mib is None for gpu in listed):
        return _host()  # which they share
    are_equal = len({gpu.name for gpu in listed}) == 1
    if not are_equal and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None  # CUDA numbers the fastest first, nvidia-smi goes by the bus
    if any(gpu.is_divided for gpu in listed):
        return None  # CUDA numbers the parts, whose memory is not listed
    index = _physical_index(device)
    found = next((gpu for gpu in listed if gpu.index == index), None)
    if found is not None and found.total_mib is None:
        return _host()
    return gpu_of(found) if found is not None and found.has_memory else None


def _physical_index(device: str) -> int | None:
    """nvidia-smi's number of the GPU; None where CUDA_VISIBLE_DEVICES names GPUs otherwise."""
    _, _, asked = device.partition(":")
    place = local_rank() if num_processes() > 1 else int(asked or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return place
    names = [name.strip() for name in visible.split(",")]
    return int(names[place]) if place < len(names) and names[place].isdigit() else None


def _host() -> Gpu | None:
    """The memory of this machine as a device to fit on."""
    try:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        total_mib = page_bytes * os.sysconf("SC_PHYS_PAGES") // MIB
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        free_mib = int(lines["MemAvailable"].split()[0]) >> 10
    except (OSError, ValueError, KeyError):
        return None
    return Gpu(
        name=HOST_NAME,
        vendor=HOST_VENDOR,
        memory_gb=round(total_mib / 1024, 1),
        memory_mib=total_mib,
        visible_mib=total_mib,
        basis={"visible_mib": "confirmed"},
        free_mib=free_mib,
    )
