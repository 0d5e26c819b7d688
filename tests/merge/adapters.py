"""Adapters written without peft, folders read without qtool, and the merge in plain float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny_models import llama_shapes, save_tensors

Values = NDArray[Any]
PREFIX = "base_model.model."
MANTISSA_BITS = {"BF16": 8, "F16": 11, "F32": 24}
SMALLEST_EXPONENT = {"BF16": -126, "F16": -14, "F32": -126}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of a Llama's linear layers in its blocks."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in llama_shapes(config).items()
        if name.split(".")[-2] in LINEAR
    }


def float_values(values: Values, dtype: str) -> NDArray[np.float64]:
    """Stored values as float64."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def round_once(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """float64 to the nearest number of `dtype`, ties to even, by scaling to integers."""
    _, exponents = np.frexp(values)
    bits = MANTISSA_BITS[dtype]
    steps = np.maximum(exponents - bits, SMALLEST_EXPONENT[dtype] - bits + 1)
    return np.ldexp(np.rint(np.ldexp(values, -steps)), steps)


def lora_tensors(
    layers: Mapping[str, tuple[int, int]], *, rank: int = 4, seed: int = 1, dtype: str = "F32"
) -> dict[str, tuple[str, Values]]:
    """Random lora_A and lora_B of every layer {module: (out, in)}."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Values]] = {}
    for module, (num_out, num_in) in layers.items():
        for part, shape in (("lora_A", (rank, num_in)), ("lora_B", (num_out, rank))):
            values = rng.normal(0, 0.1, shape).astype(np.float32)
            stored: Values = values
            if dtype == "BF16":
                stored = (values.view(np.uint32) >> 16).astype(np.uint16)
            elif dtype == "F16":
                stored = values.astype(np.float16)
            tensors[f"{PREFIX}{module}.{part}.weight"] = (dtype, stored)
    return tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, tuple[str, Values]],
    base: object,
    **config: Any,
) -> Path:
    """A folder as PEFT writes it; its config names the modules that there are factors of."""
    folder.mkdir(parents=True)
    factors = (name.removeprefix(PREFIX) for name in tensors if ".lora_" in name)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in factors}),
        "init_lora_weights": True,
        "use_dora": False,
        "megatron_core": "megatron.core",
        "rank_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def read_folder(folder: Path) -> dict[str, tuple[str, Values]]:
    """All tensors of a folder: {name: (dtype, values)}, bfloat16 as uint16."""
    dtypes = {
        "BF16": np.uint16,
        "F16": np.float16,
        "F32": np.float32,
        "U8": np.uint8,
        "I8": np.int8,
    }
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[begin:end], dtypes[entry["dtype"]])
            found[name] = (entry["dtype"], values.reshape(entry["shape"]))
    return found


def lora_sum(base: NDArray[np.float64], a: Values, b: Values, scale: float) -> NDArray[np.float64]:
    """W + scale * B A in float64."""
    return base + scale * (b.astype(np.float64) @ a.astype(np.float64))


def expected_merge(
    base: Mapping[str, tuple[str, Values]],
    adapter: Mapping[str, tuple[str, Values]],
    *,
    scale: float = 2.0,
) -> dict[str, NDArray[np.float64]]:
    """The merged values of linear layers and of all that is not adapted, rounded once."""
    merged = {}
    for name, (dtype, values) in base.items():
        floats = float_values(values, dtype)
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            a = float_values(adapter[f"{module}.lora_A.weight"][1], adapter_dtype(adapter))
            b = float_values(adapter[f"{module}.lora_B.weight"][1], adapter_dtype(adapter))
            floats = round_once(lora_sum(floats, a, b, scale), dtype)
        merged[name] = floats
    return merged


def adapter_dtype(adapter: Mapping[str, tuple[str, Values]]) -> str:
    return next(iter(adapter.values()))[0]


def assert_equal(
    folder: Path, expected: Mapping[str, NDArray[np.float64]], *, dtype: str | None = None
) -> None:
    """The folder holds these tensors, to the bit, and no others."""
    found = read_folder(folder)
    assert found.keys() == expected.keys()
    for name, (stored, values) in found.items():
        assert dtype is None or stored == dtype, name
        different = float_values(values, stored) != expected[name]
        assert not different.any(), (
            f"{name}: {different.sum()} of {different.size} differ, the first at "
            f"{np.argwhere(different)[0]}: {float_values(values, stored)[different][:3]} "
            f"instead of {expected[name][different][:3]}"
        )
