"""The rival's way to a quantized folder, as a program of its own: load with transformers, save.

    python -m qtool.bench.transformers_process SOURCE OUTPUT nf4-dq cuda:0 RESULT.json

Loading quantizes; both are timed without the imports. RESULT.json gets {"load_seconds",
"save_seconds", "peak_device_bytes", "versions"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from qtool.bench.machine import package_versions
from qtool.formats.precisions import QuantizedPrecision


def quantization_options(precision: QuantizedPrecision) -> dict[str, Any]:
    """The arguments of transformers' BitsAndBytesConfig that give what qtool makes."""
    if precision == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": precision.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": precision.endswith("-dq"),
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def main() -> None:
    """Load, save, write the result."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source, output, precision, device, result = sys.argv[1:]
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.zeros(1, device=device)  # the context is not part of loading
    start_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(**quantization_options(precision)),  # type: ignore[arg-type]
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    if on_gpu:
        torch.cuda.synchronize()
    loaded_s = time.perf_counter()
    model.save_pretrained(output)
    saved_s = time.perf_counter()
    found = {
        "load_seconds": loaded_s - start_s,
        "save_seconds": saved_s - loaded_s,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "versions": package_versions("torch", "transformers", "accelerate", "bitsandbytes"),
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
