"""Is this machine ready, and if not, what helps? Small isolated checks, each with its fix.

Knows versions, GPU, disk, Hub and CPU features; reads a model's config if asked to. Imports
neither torch nor cupy: versions come from package metadata, the GPU from nvidia-smi.

    for check in run_checks():
        print(check.name, check.status, check.found, check.fix)
"""

from __future__ import annotations

from qtool.doctor.records import Check, Status
from qtool.doctor.run import run_checks

__all__ = ["Check", "Status", "run_checks"]
