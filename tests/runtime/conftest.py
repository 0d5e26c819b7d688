"""Folders of packed models, written once per session by bitsandbytes or by qtool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.folders import PackedFolders


@pytest.fixture(scope="session")
def packed_folders(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedFolders:
    return PackedFolders(test_data / "models", tmp_path_factory.mktemp("packed"))


@pytest.fixture
def models(test_data: Path) -> Path:
    return test_data / "models"


ModelPath = Callable[[str], Path]
