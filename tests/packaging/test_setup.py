"""The two commands of the README, the pinned versions, what continuous integration calls."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_readme_begins_with_two_commands_that_make_knows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        known = _make("--dry-run", target)
        assert known.returncode == 0, known.stderr


def test_make_refuses_an_old_python() -> None:
    # --always-make: where .venv is complete, too.
    completed = _make("--always-make", "PYTHON=false", ".venv/installed-run")
    assert completed.returncode != 0
    assert "false is no Python >= 3.11" in completed.stdout


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    pins = _pins()
    extras = PROJECT["optional-dependencies"]
    named = (*extras["run"], *extras["finetune"], *extras["test"])
    for line in (*PROJECT["dependencies"], *named):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:  # an extra that takes in another one
            continue
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), line


def test_base_install_is_light() -> None:
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"typer", "rich", "numpy", "numba", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("data_beside", [True, False])
def test_ci_finds_test_data_beside_the_checkout(tmp_path: Path, data_beside: bool) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    script = checkout / ".ci/run"
    script.write_bytes((ROOT / ".ci/run").read_bytes())
    script.chmod((ROOT / ".ci/run").stat().st_mode)
    if data_beside:
        (tmp_path / "shared/data").mkdir(parents=True)
    fake_make = tmp_path / "bin/make"
    fake_make.parent.mkdir()
    fake_make.write_text('#!/bin/sh\necho "$PWD $* data=$QTOOL_TEST_DATA"\n')
    fake_make.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake_make.parent}:{os.environ['PATH']}"}
    env.pop("QTOOL_TEST_DATA", None)
    said = subprocess.run([script], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    data = tmp_path / "shared/data" if data_beside else ""
    assert said == f"{checkout} test data={data}\n"


def _make(*args: str) -> subprocess.CompletedProcess[str]:
    # The flags of the `make test` that runs these tests are not meant for this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))
