"""The wheel, built and installed into an empty environment with pip, as a user does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
# No server answers there: what works with it works offline.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
INSTALL_TIMEOUT_S = 900
CODE_SUFFIXES = {".py", ".cu", ".cuh"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, with a folder of its own to run in."""

    folder: Path

    def python(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._run(self.folder / "bin/python", *args)

    def qtool(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._run(self.folder / "bin/qtool", *args)

    def install(self, requirement: str) -> None:
        constraints = str(ROOT / "constraints.txt")
        pip = ["-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints]
        completed = self._run(self.folder / "bin/python", *pip, requirement, offline=False)
        assert completed.returncode == 0, completed.stderr

    def _run(
        self, program: Path, *args: str, offline: bool = True
    ) -> subprocess.CompletedProcess[str]:
        own = ("QTOOL_", "PYTHON", "VIRTUAL_ENV", "COLUMNS")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return subprocess.run(
            [program, *args],
            cwd=self.folder,
            env=env | (OFFLINE if offline else {}),
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install qtool` and nothing else."""
    environment = Environment(tmp_path_factory.mktemp("light"))
    venv.create(environment.folder, with_pip=True)
    environment.install(str(wheel))
    return environment


@pytest.fixture(scope="module")
def with_run_extra(light: Environment, wheel: Path, request: pytest.FixtureRequest) -> Environment:
    """The same environment after `pip install qtool[run]`; no test of `light` may come later."""
    light.install(f"{wheel}[run]")
    return light


def test_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cupy_kernels", "qtool"}
    parts = {part for name in names for part in Path(name).parts}
    assert not [part for part in parts if part.startswith(("test", "conftest", "__pycache__"))]
    assert {"qtool/py.typed", "qtool/configs/gpus.toml"} <= names
    assert {f"qtool/demo_model/{name}" for name in DEMO_FILES} == {
        name for name in names if name.startswith("qtool/demo_model/")
    }
    recipes = {path.name for path in (ROOT / "configs/recipes").glob("*.toml")}
    assert {f"qtool/configs/recipes/{name}" for name in recipes} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_every_module_and_kernel_of_the_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if Path(name).suffix in CODE_SUFFIXES}
    packages = (ROOT / "qtool", ROOT / "cupy_kernels")
    paths = [path for package in packages for path in package.rglob("*")]
    assert shipped == {str(p.relative_to(ROOT)) for p in paths if p.suffix in CODE_SUFFIXES}


def test_light_install_has_no_torch(light: Environment) -> None:
    for package in ("torch", "transformers", "accelerate", "cupy"):
        assert light.python("-c", f"import {package}").returncode == 1, package


def test_light_install_plans_quantizes_and_inspects(light: Environment) -> None:
    model = light.python(
        "-c", "from qtool.resources import demo_model_path; print(demo_model_path())"
    ).stdout.strip()
    assert light.folder in Path(model).parents
    assert light.qtool("--help").returncode == 0

    estimate = _json(light.qtool("estimate", model, "--quant", "nf4", "--json"))
    quantized = _json(light.qtool("quantize", model, "-o", "out", "--config", "nf4", "--json"))
    inspected = _json(light.qtool("inspect", "out", "--against", model, "--verify", "--json"))
    sizing = _json(light.qtool("sizing", model, "--json"))

    weights_bytes = quantized["weights_bytes"]
    assert estimate["plans"][0]["checkpoint_bytes"] == weights_bytes == inspected["weights_bytes"]
    assert inspected["quant"] == "nf4"
    assert inspected["verify"]["ok"] is True
    assert sizing["rows"]


def test_light_install_says_what_generate_needs(light: Environment) -> None:
    completed = light.qtool("generate", "anything", "hello")
    assert completed.returncode == 1
    assert 'pip install "qtool[run]"' in completed.stderr


def test_light_install_shows_the_demo_up_to_the_text(light: Environment) -> None:
    completed = light.qtool("demo")
    assert completed.returncode == 0, completed.stderr
    assert "rules hold" in completed.stdout
    assert 'pip install "qtool[run]"' in completed.stderr


def test_demo_runs_offline_where_the_run_extra_is_installed(with_run_extra: Environment) -> None:
    shown = _json(with_run_extra.qtool("demo", "--json"))
    assert shown["generate"]["before"]["new_tokens"] > 0
    assert shown["generate"]["after"]["text"]
    assert shown["warnings"] == []


def _json(completed: subprocess.CompletedProcess[str]) -> dict:
    assert completed.returncode == 0, completed.stderr
    document: dict = json.loads(completed.stdout)
    return document
