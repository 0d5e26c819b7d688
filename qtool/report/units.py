"""Numbers as people read them.

GiB is 2^30 bytes, MiB 2^20; GB/s is 1e9 bytes per second, MB/s 1e6.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_bytes(num_bytes: int, *, beside: int | None = None) -> str:
    """Bytes with the unit that keeps three or four digits: "512 B", "3.25 MiB", "14.96 GiB".

    Args:
        beside: other bytes that stand nearby to be compared: their unit is taken.
    """
    judged = num_bytes if beside is None else beside
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if judged >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes} B"


def format_done(num_bytes: int, total_bytes: int) -> str:
    """A part and the whole in one unit: "1.27/6.27 GiB"."""
    part = format_bytes(num_bytes, beside=total_bytes).partition(" ")[0]
    return f"{part}/{format_bytes(total_bytes)}"


def format_gib(num_bytes: int) -> str:
    """GiB with two digits and no unit, for table columns whose head names the unit."""
    return f"{num_bytes / GIB:,.2f}"


def format_mib(num_bytes: int) -> str:
    """The same in MiB."""
    return f"{num_bytes / MIB:,.2f}"


def format_count(num: int) -> str:
    """A parameter count: "8.03 B", "134.5 M", "260 k"."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if num >= size:
            return f"{num / size:,.{2 if unit == 'B' else 1}f} {unit}"
    return f"{num / 1000:,.0f} k" if num >= 1000 else str(num)


def format_rate(num_bytes: int, seconds: float) -> str:
    """Bytes per second as GB/s, or MB/s where that would be 0.0."""
    if seconds <= 0:
        return "- GB/s"
    rate = num_bytes / seconds
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.1f} MB/s"
