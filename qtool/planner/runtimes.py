"""What the runtimes do that one may not expect, each with a line that says so.

transformers + bitsandbytes replaces nn.Linear only, so routed experts stay in 16 bit; its device
map gives weights a part of the GPU; vLLM takes a share of the GPU whatever the model needs.
"""

from __future__ import annotations

import math
from typing import Final

from qtool.architecture import Architecture
from qtool.errors import Option, QtoolError, Words
from qtool.formats.precisions import QUANTIZED_PRECISIONS
from qtool.planner.activations import ATTENTION_MATRIX_BYTES
from qtool.planner.gpus import OLDEST_COMPUTE_CAPABILITY, Gpu
from qtool.planner.model import PlannedModel
from qtool.planner.records import Workload
from qtool.planner.units import GIB, HALF_BYTES

# accelerate leaves a tenth of a GPU free of weights; the quantizer for bitsandbytes a tenth more.
DEVICE_MAP_SHARE: Final = 0.90
QUANTIZER_SHARE: Final = 0.90
# Bits of a packed weight in transformers' reckoning, which leaves absmax out.
DEVICE_MAP_BITS: Final = {"int8": 8}
AMPERE: Final = 8  # the compute capability from which on there is bfloat16
VLLM_SHARE: Final = 0.90  # gpu_memory_utilization
# Phi-3's own preparation of inputs, which looks at this key alone, with its default.
SWITCHING_TYPES: Final = frozenset({"phi3"})
SWITCHING_KEY: Final = "original_max_position_embeddings"
SWITCHING_TOKENS: Final = 4096


def usable_share(workload: Workload) -> float:
    """The part of a GPU's usable memory that the runtime lets itself have."""
    return VLLM_SHARE if workload.runtime == "vllm" else 1.0


def switching_tokens(model: PlannedModel, workload: Workload) -> int | None:
    """The length, within the workload's context, at which transformers throws the cache of a whole
    text away for the next token, since rotary frequencies change there; the old one goes when the
    new one is there."""
    architecture = model.architecture
    if architecture is None or architecture.model_type not in SWITCHING_TYPES:
        return None
    generates = workload.runtime == "transformers" and workload.mode == "generate"
    tokens = model.config.get(SWITCHING_KEY, SWITCHING_TOKENS)
    is_within = generates and isinstance(tokens, int) and tokens <= workload.context
    return tokens if is_within else None


def plan_notes(model: PlannedModel, quant: str, workload: Workload) -> tuple[str, ...]:
    """Lines about the plan, whatever the GPU."""
    notes = [*_expert_notes(model, quant, workload)]
    if workload.runtime == "transformers" and workload.mode == "generate" and quant == "int8":
        notes.append(
            "LLM.int8() multiplies columns with outliers once more as they are; how many there are "
            "depends on weights and text, counted as for weights drawn at random"
            + (", in float16" if model.element_bytes == HALF_BYTES else "")
        )
    if workload.runtime == "vllm":
        notes.append(
            "vLLM: the cache in pages of 16 tokens, prompts in pieces of 8,192 tokens; it takes "
            f"{VLLM_SHARE:.0%} of the GPU whatever the model needs (gpu_memory_utilization)"
        )
    notes += _split_notes(model, workload)
    switching = switching_tokens(model, workload)
    if switching is not None:
        notes.append(
            f"at {switching:,} tokens rotary frequencies change: transformers computes the whole "
            "text anew for the next token, and holds two caches then"
            + ("" if switching == workload.context else "; what fits has room for that, too")
        )
    notes += _mode_notes(model, quant, workload)
    is_eager = model.architecture and model.architecture.model_type in ATTENTION_MATRIX_BYTES
    if workload.mode == "generate" and workload.runtime != "vllm" and is_eager:
        notes.append(
            "transformers has no fused attention for this type: scores of tokens x tokens x heads "
            "lie in memory, so a long prompt takes most of it (vLLM does not)"
        )
    generates = workload.mode == "generate"
    if generates and workload.runtime == "qtool" and workload.kv_dtype in ("fp8", "int8"):
        notes.append(
            f"qtool's own cache is 16 bit; {workload.kv_dtype} is counted as transformers' "
            "quantized cache keeps it"
        )
    if not generates and workload.gpus > 1:
        notes.append(
            "training on several GPUs: layers spread over them; data parallel training "
            "takes the memory of one GPU on each"
        )
    return tuple(notes)


def _mode_notes(model: PlannedModel, quant: str, workload: Workload) -> list[str]:
    notes = []
    has_experts = model.architecture is not None and model.architecture.experts is not None
    if workload.mode == "qlora" and workload.runtime == "qtool" and not has_experts:
        notes.append(
            "as `qtool finetune` trains; --runtime transformers plans PEFT with bitsandbytes, "
            "which makes float32 copies of what is not packed"
        )
    if workload.mode == "full" and workload.runtime == "qtool" and quant == "fp32":
        notes.append("what `qtool finetune --method full` does unless told --master-dtype bf16")
    if workload.mode == "full" and quant in ("bf16", "fp16"):
        notes.append(
            "gradients and optimizer states in 16 bit, as the Trainer leaves them for a model "
            "loaded in 16 bit; --quant fp32 keeps all of them in float32"
        )
    return notes


def check_mode(quant: str, workload: Workload) -> None:
    """Raise QtoolError if nobody trains or runs a model so."""
    mode, is_packed = workload.mode, quant in QUANTIZED_PRECISIONS
    if mode != "generate" and workload.runtime == "vllm":
        raise _refusal(
            (Option("runtime", "vllm"), " does not train"), Option("runtime", "transformers")
        )
    if mode == "qlora" and not is_packed:
        raise _refusal(
            (Option("mode", "qlora"), f" trains on a packed base, not {quant}"),
            Option("mode", "lora"),
        )
    if mode in ("lora", "full") and is_packed:
        raise _refusal(
            (Option("mode", mode), f" trains on a 16 or 32-bit base, not {quant}"),
            Option("mode", "qlora"),
        )


def _refusal(what: Words, instead: Option) -> QtoolError:
    return QtoolError(what, kind="usage", hint=("use ", instead))


def fit_notes(
    model: PlannedModel,
    quant: str,
    workload: Workload,
    gpu: Gpu,
    *,
    weights_bytes: int,
) -> tuple[str, ...]:
    """Lines about the plan on a GPU, or so many of them."""
    notes = [*kernel_notes(workload, gpu)]
    if quant == "bf16" and _lacks_bfloat16(gpu):
        notes.append("it has no bfloat16 arithmetic: load in float16, which takes the same")
    return (*notes, *_device_map_notes(model, quant, workload, gpu, weights_bytes))


def kernel_notes(workload: Workload, gpu: Gpu) -> tuple[str, ...]:
    """What stands against the plan on a GPU, however much memory it has."""
    if workload.runtime != "qtool" or not gpu.lacks_kernels:
        return ()
    oldest = ".".join(map(str, OLDEST_COMPUTE_CAPABILITY))
    others = "transformers or vllm" if workload.mode == "generate" else "transformers"
    return (
        "qtool's kernels do not run there, whatever its memory: they need an NVIDIA GPU of compute "
        f"capability {oldest} or newer; --runtime {others} plans for those",
    )


def _split_notes(model: PlannedModel, workload: Workload) -> list[str]:
    """What vLLM asserts of heads that it spreads over GPUs (ModelConfig.verify_with_parallel_config
    and QKVParallelLinear); key heads that are too few it repeats."""
    architecture, gpus = model.architecture, workload.gpus
    if architecture is None or workload.runtime != "vllm" or workload.split != "tensor":
        return []
    heads, key_heads = architecture.num_attention_heads, architecture.num_kv_heads
    if heads % gpus == 0 and (key_heads % gpus == 0 or gpus % key_heads == 0):
        return []
    return [
        f"vLLM refuses this: {heads} attention heads with {key_heads} for keys do not spread "
        f"evenly over {gpus} GPUs; a pipeline takes any number of GPUs"
    ]


def _lacks_bfloat16(gpu: Gpu) -> bool:
    major = (gpu.compute_capability or "").partition(".")[0]
    return gpu.vendor == "NVIDIA" and major.isdigit() and int(major) < AMPERE


def _device_map_notes(
    model: PlannedModel, quant: str, workload: Workload, gpu: Gpu, weights_bytes: int
) -> tuple[str, ...]:
    if workload.runtime != "transformers" or model.architecture is None:
        return ()
    needed_bytes, num_gpus = weights_bytes, workload.gpus
    if quant in QUANTIZED_PRECISIONS:
        needed_bytes = _device_map_bytes(model, model.architecture, quant)
    share = DEVICE_MAP_SHARE * (QUANTIZER_SHARE if quant in QUANTIZED_PRECISIONS else 1.0)
    if needed_bytes <= share * gpu.usable_bytes * num_gpus:
        return ()
    instead = "; device_map={'': 0} does not" if num_gpus == 1 else ""
    return (
        f'device_map="auto" gives weights at most {share:.0%} of a GPU, so it would move some to '
        f"the CPU{instead}",
    )


def _expert_notes(model: PlannedModel, quant: str, workload: Workload) -> list[str]:
    architecture = model.architecture
    if architecture is None or quant not in QUANTIZED_PRECISIONS or model.packed:
        return []
    expert_elements = sum(
        math.prod(tensor.shape) for tensor in architecture.tensors.values() if tensor.is_expert
    )
    if not expert_elements:
        return []
    if workload.runtime == "transformers":
        kept_bytes = expert_elements * model.element_bytes
        return [
            "transformers + bitsandbytes replaces linear layers only, and routed experts are none: "
            f"{kept_bytes / GIB:,.2f} GiB of them stay as they are"
        ]
    if workload.runtime == "qtool":
        return [
            "with every routed expert packed; qtool itself neither quantizes nor runs packed "
            "mixtures of experts yet"
        ]
    return []


def _device_map_bytes(model: PlannedModel, architecture: Architecture, quant: str) -> int:
    packed, element_bytes = model.packable(), model.element_bytes
    bits = DEVICE_MAP_BITS.get(quant, 4)
    return sum(
        math.prod(tensor.shape) * (bits if name in packed else 8 * element_bytes) // 8
        for name, tensor in architecture.tensors.items()
        if tensor.tied_to is None
    )
