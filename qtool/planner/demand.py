"""What a workload asks of one GPU's allocator at the peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qtool.planner.records import Component, ComponentName

Parts = Mapping[ComponentName, Component]


class Demand(NamedTuple):
    """Workspace and overhead apart.

    `fixed_bytes` of the parts lie there all the time, so that the allocator cannot fragment them;
    `steady_bytes` stay between steps. `paged_bytes` may lie outside the GPU.
    """

    parts: Parts
    fixed_bytes: int
    steady_bytes: int
    paged_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def dynamic_bytes(self) -> int:
        """What comes and goes."""
        return self.total_bytes - self.fixed_bytes
