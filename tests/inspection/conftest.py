"""Folders that bitsandbytes itself wrote, through transformers, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "nf4-dq in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="session")
def bitsandbytes_folder(
    test_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A function (model, key of OPTIONS) -> the folder, written once per session."""
    written: dict[tuple[str, str], Path] = {}

    def write(model: str, kind: str) -> Path:
        if (model, kind) not in written:
            folder = tmp_path_factory.mktemp("bitsandbytes") / model
            _write(test_data / "models" / model, folder, kind)
            written[model, kind] = folder
        return written[model, kind]

    return write


def _write(source: Path, folder: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(**OPTIONS[kind]),
        dtype="bfloat16",
        device_map="cpu",
    )
    model.save_pretrained(folder, max_shard_size="4MB")
