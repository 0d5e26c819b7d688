"""What generation needs: the [run] extra, and no bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.runtime import requirements
from tests.runtime.folders import PackedFolders
from tests.test_structure import loaded_modules
from tests.tiny_models import write_llama

WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None  # importing it raises ImportError
from qtool.runtime.generate import Limits, Sampling, generate
from qtool.runtime.loading import LoadOptions, load_model
with load_model(sys.argv[1], LoadOptions(device="cpu")) as loaded:
    result = generate(loaded, [3, 4, 5], Sampling(), Limits(4))
print(loaded.num_packed_layers, len(result.token_ids))
"""


@pytest.mark.parametrize("precision", ["nf4-dq", "int8"])
def test_bitsandbytes_is_not_needed(packed_folders: PackedFolders, precision: str) -> None:
    folder = packed_folders.by_qtool("TinyStories-656K-hf", precision)
    command = [sys.executable, "-c", WITHOUT_BITSANDBYTES, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_layers, num_tokens = map(int, done.stdout.split())
    assert num_layers > 0
    assert num_tokens == 4


def test_missing_packages_are_said_with_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"transformers"}
    monkeypatch.setattr(
        requirements.importlib.util, "find_spec", lambda name: name if name in have else None
    )
    with pytest.raises(QtoolError, match="needs torch and accelerate, not installed") as caught:
        requirements.require_run_extra()
    assert caught.value.hint == 'pip install "qtool[run]"'


@pytest.mark.parametrize("found", ["4.57.6", "5.9.0"])
def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: found)
    with pytest.raises(QtoolError, match=f"transformers {found} is too old"):
        requirements.require_run_extra()


@pytest.mark.parametrize("found", ["5.10.1", "5.23.0", "6.0.0.dev0"])
def test_a_newer_transformers_is_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: found)
    requirements.require_run_extra()


def test_a_packed_model_runs_without_being_packed_again(packed_folders: PackedFolders) -> None:
    folder = str(packed_folders.by_qtool("TinyStories-656K-hf", "nf4-dq"))
    assert requirements.require_model(folder).tensors
    with pytest.raises(QtoolError, match="is quantized already") as caught:
        requirements.require_model(folder, "int8")
    assert "leave out quant='int8' to run it as it is stored" in caught.value.hint


def test_what_another_method_packed_does_not_run_as_it_is(tmp_path: Path) -> None:
    config = write_llama(tmp_path) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="quant_method is 'gptq'") as caught:
        requirements.require_model(str(tmp_path), "int8")
    assert caught.value.hint.startswith("start from the full-precision checkpoint")


def test_a_file_of_a_model_s_folder_is_told_without_torch(tmp_path: Path) -> None:
    write_llama(tmp_path, num_shards=3)
    for name, said in (
        ("config.json", "found a file without weights"),
        ("model-00002-of-00003.safetensors", "found one of the 3 shards"),
    ):
        with pytest.raises(QtoolError, match=said) as caught:
            requirements.require_model(str(tmp_path / name))
        assert caught.value.hint == f"give its folder, {tmp_path}"
        assert "torch" not in loaded_modules("generate", str(tmp_path / name), "Hi")
