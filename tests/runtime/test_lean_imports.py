"""What is left out while transformers is imported, and that it is there when it is asked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qtool.resources import demo_model_path
from qtool.runtime import lean_imports

HEAVY = (
    "bitsandbytes",
    "torchvision",
    "torchaudio",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "sympy",
    "sklearn",
)
ONE_RUN = f"""
import sys
from qtool.cli import main

sys.argv = ["qtool", "generate", {str(demo_model_path())!r}, "a", "--device", "cpu", "--no-chat",
            "--max-new-tokens", "2", "--quiet"]
try:
    main()
except SystemExit as done:
    assert not done.code
print()
print("found", *(name for name in {HEAVY!r} if name in sys.modules))
"""
AFTERWARDS = """
import gc
import sys
from importlib.metadata import packages_distributions as read_all
from importlib import metadata
import torch
from qtool.runtime.lean_imports import INDEXING, MARKS, _Distributions, lean_imports

marking = [getattr(torch.compiler, name) for name in MARKS]
with lean_imports():
    import transformers
    from transformers import masking_utils, models
    from transformers.utils import import_utils

    assert "torch._dynamo" not in sys.modules
    assert isinstance(metadata.packages_distributions(), _Distributions)
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 10_000
assert metadata.packages_distributions is read_all
assert INDEXING not in sys.modules
assert [getattr(torch.compiler, name) for name in MARKS] == marking
assert torch.distributed.is_available()
spread = torch.distributed.tensor
assert not isinstance(torch.ones(1), (spread.DTensor, int))
assert "torch.distributed.tensor" not in sys.modules
assert spread.DTensor.from_local is sys.modules["torch.distributed.tensor"].DTensor.from_local
assert spread.Shard is torch.distributed.tensor.Shard
assert torch.distributed.tensor is sys.modules["torch.distributed.tensor"]
assert issubclass(torch.distributed.tensor.DTensor, torch.Tensor)
one = torch.ones(1).as_subclass(torch.distributed.tensor.DTensor)
assert isinstance(one, spread.DTensor) and not isinstance(torch.ones(1), spread.DTensor)
assert not hasattr(torch.distributed, "nothing_of_the_kind")

frame = masking_utils.TransformGetItemToIndex()
assert type(frame) is sys.modules[INDEXING].TransformGetItemToIndex
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]

listing = import_utils.create_import_structure_from_path
assert getattr(listing, "__closure__", None) is None  # its own again, without our memory
fresh = import_utils.define_import_structure(models.__file__)
names = {name for files in fresh.values() for found in files.values() for name in found}
assert len(names) > 1000 and names <= set(dir(models)) and names <= set(dir(transformers))
"""
MEANWHILE = """
import sys
from qtool.runtime.lean_imports import INDEXING, lean_imports

with lean_imports():
    import torch

    assert torch._dynamo.allow_in_graph(len) is torch._dynamo.disable(recursive=False)(len) is len
    assert "torch._dynamo" not in sys.modules
    assert torch._dynamo.config.cache_size_limit > 0  # more than marks: the real one is imported
    from torch._dynamo.exc import Unsupported

    assert torch._dynamo is sys.modules["torch._dynamo"]
    assert sys.modules[INDEXING].trace_wrapped
assert torch._dynamo.exc.Unsupported is Unsupported
"""


def run(program: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_run_needs_none_of_it() -> None:
    assert run(ONE_RUN).splitlines()[-1].split() == ["found"]


def test_a_run_with_an_adapter(tmp_path: Path) -> None:
    """PEFT names parts of PyTorch that nothing imported, and bitsandbytes where it is installed."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(demo_model_path()))
    peft.get_peft_model(model, peft.LoraConfig(r=8)).save_pretrained(str(tmp_path))
    program = ONE_RUN.replace('"--quiet"', f'"--quiet", "--adapter", {str(tmp_path)!r}')
    assert run(program).splitlines()[-1].split() == ["found"]


@pytest.mark.parametrize("program", [AFTERWARDS, MEANWHILE], ids=["afterwards", "meanwhile"])
def test_all_is_there_when_asked_for(program: str) -> None:
    run(program)


def test_transformers_that_is_there_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    finders = sys.meta_path.copy()
    with lean_imports.lean_imports():
        assert sys.meta_path == finders
        assert "sklearn" not in sys.modules


def test_a_folder_is_listed_once(tmp_path: Any) -> None:
    file = tmp_path / "model.py"
    file.touch()
    listed: list[Any] = []

    def list_folder(path: Any) -> dict[str, set[str]]:
        listed.append(path)
        return {"model": {"Model"}}

    remembered = lean_imports._remembered(list_folder)
    first = remembered(tmp_path)
    again = remembered(str(file))  # a file stands for its folder
    assert listed == [tmp_path]
    assert again is first


def test_packages_are_not_found_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with lean_imports.without_packages(("wave",)):
        assert importlib.util.find_spec("wave") is None
        with pytest.raises(ImportError):
            importlib.import_module("wave")
    assert importlib.import_module("wave") is sys.modules["wave"]


def test_packages_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ModuleType("wave")
    monkeypatch.setitem(sys.modules, "wave", there)
    with lean_imports.without_packages(("wave",)):
        assert sys.modules["wave"] is there
    assert sys.modules["wave"] is there


def test_a_torchvision_that_cannot_be_imported_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another build than PyTorch's."""
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.99.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n"
    )
    found = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    whole = "import importlib.util as util; assert util.find_spec('torchvision')\n"
    assert run(found + whole + ONE_RUN).splitlines()[-1].split() == ["found"]


def test_distributions_are_asked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of packages; the records of all are read for others, and for shared ones."""
    num_read: list[int] = []
    every = {"PIL": ["pillow"], "flash_attn": ["flash-attn-4"], "pytest": ["pytest"]}

    def read_all() -> dict[str, list[str]]:
        num_read.append(1)
        return every

    monkeypatch.setattr("importlib.metadata.packages_distributions", read_all)
    with lean_imports._asking_for_distributions():
        found = importlib.metadata.packages_distributions()
        assert found["pytest"] == ["pytest"]
        assert found.get("pytest", []) == ["pytest"]
        assert not num_read
        assert found["PIL"] == ["pillow"]
        assert found["flash_attn"] == ["flash-attn-4"]
        assert found.get("nothing_of_the_kind", []) == []
        assert dict(found) == every
        with pytest.raises(KeyError):
            found["nothing_of_the_kind"]
    assert num_read == [1]
    assert importlib.metadata.packages_distributions is read_all
