"""What bitsandbytes' CUDA kernels wrote for 67 inputs, as the test data holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NUMPY = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "I8": np.int8,
}


@dataclass(frozen=True)
class GoldenCase:
    number: int
    dtype: str
    blocksize: int
    tensors: dict[str, np.ndarray]

    @property
    def values(self) -> np.ndarray:
        return self.tensors["input"].reshape(-1)

    def of(self, name: str) -> np.ndarray:
        return self.tensors[name].reshape(-1)


def read_golden(test_data: Path) -> list[GoldenCase]:
    """All cases; bfloat16 as its bits, which is why the file is not read with safetensors."""
    tensors, metadata = _read(test_data)
    return [
        GoldenCase(
            number=case["case"],
            dtype=TAGS[case["dtype"]],
            blocksize=case["blocksize"],
            tensors={
                key.partition(".")[2]: array
                for key, array in tensors.items()
                if key.startswith(f"{case['case']:03d}.")
            },
        )
        for case in json.loads(metadata["cases"])
    ]


def read_code_tables(test_data: Path) -> dict[str, np.ndarray]:
    """The tables that bitsandbytes stores beside the weights."""
    return {key: array for key, array in _read(test_data)[0].items() if key.endswith("_map")}


def _read(test_data: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    raw = (test_data / "golden" / "bitsandbytes_cuda.safetensors").read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data_start])
    metadata = header.pop("__metadata__")
    tensors = {}
    for key, entry in header.items():
        start, stop = (data_start + offset for offset in entry["data_offsets"])
        data = np.frombuffer(raw, np.uint8)[start:stop].copy()
        tensors[key] = data.view(NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata
