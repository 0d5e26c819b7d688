"""What is asked of a run on the meta device, and its answer. Sizes are bytes; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qtool.defaults import PREFILL_CHUNK

Mode = Literal["generate", "qlora", "lora", "full"]
Runtime = Literal["qtool", "transformers"]
FloatDtype = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw_8bit"]

# What a storage is for. "dequant_buffer": weights and statistics made from codes, and the copies
# of activations that packed layers compute with; "other": inputs, masks, rotary tables.
Origin = Literal[
    "weights",
    "kv_cache",
    "activations",
    "logits",
    "dequant_buffer",
    "adapters",
    "gradients",
    "optimizer",
    "other",
]


@dataclass(frozen=True, slots=True)
class LoraAdapters:
    """LoRA on linear layers: `targets` are module names as PEFT takes them, empty for all layers
    but the output head."""

    r: int = 16
    targets: tuple[str, ...] = ()
    dropout: float = 0.05
    dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, slots=True)
class ExactRequest:
    """What to run.

    Args:
        quant: a precision of the contract; a full one is that of weights and activations.
        compute_dtype: of activations and unpacked weights where `quant` packs linear layers.
        runtime: whose packed layers: qtool's own, or bitsandbytes' as transformers loads them.
        context: tokens per sequence, `batch` sequences.
        prefill_chunk: tokens of a prompt that qtool's own runtime runs at once.
        head_quant: what the output head is packed in there; None leaves it as it is.
        lora: for modes qlora and lora.
        adapter: the adapter_config.json of one that is generated with; None for none.
        int8_outliers: for bitsandbytes' INT8, the share of a layer's input columns that hold a
            value beyond the threshold 6.0, by the last part of the layer's name ("down_proj"). It
            depends on weights and text; no entry means none.
    """

    quant: str
    mode: Mode = "generate"
    runtime: Runtime = "qtool"
    context: int = 4096
    batch: int = 1
    prefill_chunk: int = PREFILL_CHUNK
    head_quant: str | None = None
    compute_dtype: FloatDtype = "bf16"
    lora: LoraAdapters = LoraAdapters()
    adapter: Mapping[str, Any] | None = None
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = True
    int8_outliers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExactPeak:
    """The most that PyTorch's allocator has handed out at once, without cuBLAS' workspace.

    Args:
        weights_bytes: parameters and buffers of the model, adapters not among them.
        breakdown: what the storages alive at the peak are for; adds up to `allocated_peak_bytes`.
        at_peak: the moment: phase, module and operator.
        seconds: that building and running took, imports not counted.
    """

    allocated_peak_bytes: int
    weights_bytes: int
    breakdown: Mapping[Origin, int]
    at_peak: str
    seconds: float
