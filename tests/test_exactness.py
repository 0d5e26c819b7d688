"""`estimate`'s checkpoint_bytes = `quantize --dry-run`'s weights_bytes = the bytes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.formats.precisions import QUANTIZED_PRECISIONS
from tests.cli.running import run
from tests.tiny_models import write_llama

MODELS = ["tinylm-19m", "stories260K-hf", "TinyStories-656K-hf", "slm4096-gpt2-hf"]


def bytes_on_disk(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(end - begin for begin, end in (e["data_offsets"] for e in header.values()))
    return total


def check(model: Path, precision: str, out: Path) -> None:
    (plan,) = run("estimate", model, "--quant", precision, "--json").document["plans"]
    planned = run("quantize", model, "--quant", precision, "--dry-run", "--json").document
    ran = run("quantize", model, "--quant", precision, "-o", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    found = bytes_on_disk(out)
    assert plan["checkpoint_bytes"] == planned["weights_bytes"] == found
    assert ran.document["weights_bytes"] == found
    assert run("inspect", out, "--json").document["weights_bytes"] == found


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_real_models(test_data, tmp_path, name, precision):
    check(test_data / "models" / name, precision, tmp_path / "out")


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("tied", [False, True])
def test_generated_models(tmp_path, precision, dtype, tied):
    write_llama(tmp_path / "model", dtype=dtype, tied=tied, hidden=72, mlp=172, num_shards=2)
    check(tmp_path / "model", precision, tmp_path / "out")


@pytest.mark.parametrize("precision", ["bf16", *QUANTIZED_PRECISIONS])
def test_a_bare_config_gives_the_size_that_the_weights_give(tmp_path, precision):
    write_llama(tmp_path / "model")
    (tmp_path / "bare").mkdir()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    sizes = {
        run("estimate", tmp_path / name, "--quant", precision, "--json").document["plans"][0][
            "checkpoint_bytes"
        ]
        for name in ("model", "bare")
    }
    assert len(sizes) == 1
