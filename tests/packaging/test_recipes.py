"""The recipes that ship: each is named after the precision that it makes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from inspect import signature

import pytest

from qtool.cli.quantize import quantize
from qtool.resources import config_path, demo_model_path

RECIPES = sorted(path.stem for path in config_path("recipes").glob("*.toml"))


def test_there_is_a_recipe_for_each_common_precision() -> None:
    assert RECIPES == ["fp4", "int8", "nf4", "nf4-dq"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_the_precision_it_is_named_after(name: str) -> None:
    program = [sys.executable, "-c", "from qtool.cli import main; main()"]
    command = [*program, "quantize", str(demo_model_path()), "--dry-run", "--json"]
    completed = subprocess.run(
        [*command, "--config", name], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["quant"] == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_differs_from_the_defaults_in_its_precision_alone(name: str) -> None:
    values = tomllib.loads(config_path(f"recipes/{name}.toml").read_text())["quantize"]
    parameters = signature(quantize).parameters
    defaults = {key: parameters[key.replace("-", "_")].default for key in values}
    assert values == {**defaults, "quant": name}


def test_default_precision_has_a_recipe() -> None:
    assert signature(quantize).parameters["quant"].default in RECIPES
