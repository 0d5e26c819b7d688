"""Files that ship with qtool: the GPU catalogue, recipes, the demo model.

In a wheel configs/ lies inside the package; in a checkout it lies beside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def config_path(name: str) -> Path:
    """The path of `configs/NAME`, which need not exist."""
    installed = PACKAGE / "configs"
    return (installed if installed.is_dir() else PACKAGE.parent / "configs") / name


def demo_model_path() -> Path:
    """The folder of the demo model."""
    return PACKAGE / "demo_model"
