"""Versions of the packages that qtool uses, from their metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import qtool
from qtool.doctor.records import Check

MINIMUM_PYTHON: Final = (3, 11)


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package, the oldest version that works and the extra of qtool that installs it.

    `extra` is "" for the base install, which needs it whatever one does; `needed_by` says what
    needs one of an extra.
    """

    package: str
    minimum: str
    extra: str = ""
    needed_by: str = "generate, finetune and demo need it"


# pyproject.toml says the same; a test compares the two.
REQUIREMENTS: Final = (
    Requirement("typer", "0.26"),
    Requirement("rich", "13.7"),
    Requirement("numpy", "1.26"),
    Requirement("numba", "0.60"),
    Requirement("safetensors", "0.5"),
    Requirement("huggingface_hub", "1.0"),
    Requirement("torch", "2.6", "run"),
    Requirement("transformers", "5.10", "run"),
    Requirement("accelerate", "1.6", "run"),
    Requirement(
        "peft", "0.17", "finetune", "generate --adapter, finetune and the check of merge need it"
    ),
    Requirement("trl", "1.16", "finetune", "finetune needs it"),
    Requirement("datasets", "4.0", "finetune", "finetune needs it"),
)


def check_packages() -> Iterator[Check]:
    """Python, qtool, and every package of the base install, `qtool[run]` and `qtool[finetune]`."""
    yield _check_python()
    yield Check("qtool", "ok", f"{qtool.__version__} in {Path(qtool.__file__).parent}")
    for requirement in REQUIREMENTS:
        yield check_requirement(requirement)
    yield _check_bitsandbytes()


def installed_version(package: str) -> str | None:
    """The version in the package's metadata, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirement(requirement: Requirement) -> Check:
    """Whether a package is there and new enough."""
    name, minimum, extra = requirement.package, requirement.minimum, requirement.extra
    version = installed_version(name)
    if version is None and extra:
        found = f"not installed; {requirement.needed_by}"
        return Check(name, "info", found, f'pip install "qtool[{extra}]"')
    if version is None:
        return Check(name, "fail", "not installed", f'pip install "{name}>={minimum}"')
    if _release(version) < _release(minimum):
        fix = f'pip install --upgrade "{name}>={minimum}"'
        return Check(name, "fail", f"{version}, older than {minimum}", fix)
    return Check(name, "ok", version)


def _check_python() -> Check:
    found = f"{platform.python_version()} ({platform.machine()}) {sys.executable}"
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return Check("python", "fail", found, f"install Python {wanted} or newer")
    return Check("python", "ok", found)


def _check_bitsandbytes() -> Check:
    found = installed_version("bitsandbytes") or "not installed"
    return Check("bitsandbytes", "info", f"{found}; only qtool bench measures beside it")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
