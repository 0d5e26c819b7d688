"""The direction of imports, and what may be imported before a verb needs it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qtool"
KERNELS = PACKAGE.parent / "cupy_kernels"

# Each layer may import itself and what stands below it.
LAYERS = [
    {"cli"},
    {"report"},
    {"bench", "demo", "exact", "merge"},
    {"doctor", "finetune"},
    {"inspection", "optim", "planner", "runtime"},
    {"quantize"},
    {"architecture", "backends", "checkpoint"},
    {"formats"},
    {"defaults", "errors", "events", "resources"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Third-party packages that only some of qtool may import.
HOMES = {
    "typer": {"cli"},
    "rich": {"report"},
    "torch": {"bench", "exact", "runtime", "finetune", "merge", "optim"},
    "transformers": {"bench", "exact", "runtime", "finetune"},
    "accelerate": {"runtime", "finetune"},
    "peft": {"bench", "exact", "runtime", "finetune"},
    "trl": {"finetune"},
    "datasets": {"finetune"},
    "pyarrow": {"finetune"},
    "bitsandbytes": {"bench"},
    "cupy": {"backends", "bench"},
    "cupy_kernels": {"backends", "bench", "optim", "runtime"},
    "numba": {"backends"},
    "huggingface_hub": {"checkpoint", "doctor"},
    "matplotlib": {"report"},
}
# Modules that no start-up, help or plan may load.
HEAVY = ["torch", "transformers", "accelerate", "cupy", "numba", "matplotlib"]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path, *, runtime_only: bool = False):
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped |= {inner for child in node.body for inner in ast.walk(child)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_and_third_parties_stay_at_home(path):
    layer = layer_of(path)
    for name in imports_of(path, runtime_only=True):
        root, *rest = name.split(".")
        if root == "qtool" and rest and layer in RANK:
            target = rest[0]
            assert target in RANK, f"{target} has no layer"
            same_or_below = target == layer or RANK[target] > RANK[layer]
            assert same_or_below, f"{layer} must not import {name}"
        if root in HOMES:
            assert layer in HOMES[root], f"{layer} must not import {root}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_of_qtool_only_what_the_formats_are(path):
    for name in imports_of(path):
        root, *rest = name.split(".")
        assert root != "qtool" or rest[0] == "formats", f"cupy_kernels must not import {name}"
        assert root not in {"torch", "typer", "rich", "numba"}


def test_every_package_has_a_layer():
    names = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert names - set(RANK) == set()


def loaded_modules(*arguments: str) -> set[str]:
    script = (
        "import sys, json, io, contextlib\n"
        "sys.argv = ['qtool', *json.loads(sys.argv[1])]\n"
        "from qtool.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_help_loads_nothing_heavy_and_no_numpy():
    assert loaded_modules("--help").isdisjoint([*HEAVY, "numpy", "huggingface_hub"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("estimate", "{model}"),
        ("sizing",),
        ("inspect", "{model}"),
        ("quantize", "{model}", "--dry-run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_planning_and_looking_load_nothing_heavy(arguments, tmp_path):
    from tests.tiny_models import write_llama

    write_llama(tmp_path)
    loaded = loaded_modules(*(word.format(model=tmp_path) for word in arguments))
    assert loaded.isdisjoint(HEAVY)


def test_quantize_loads_no_torch(tmp_path):
    from tests.tiny_models import write_llama

    write_llama(tmp_path / "in")
    loaded = loaded_modules("quantize", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    assert "numba" in loaded
    assert loaded.isdisjoint(["torch", "transformers", "accelerate"])
