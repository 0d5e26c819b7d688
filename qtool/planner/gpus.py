"""The GPU catalogue (configs/gpus.toml), forgiving names, and the memory a GPU really offers.

A GPU's memory as sold is more than its driver reports, and that is more than a program can have.
`usable_bytes` is the last of the three. Reads TOML and, for `auto`, what nvidia-smi prints.

    find_gpu("rtx 4090").usable_bytes
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from qtool.errors import Option, QtoolError
from qtool.planner.units import GIB, MIB
from qtool.resources import config_path

FieldBasis = Literal["confirmed", "derived", "recalled"]
ANY_VENDOR: Final = "any"
HOST_VENDOR: Final = "host"  # no GPU, but the machine's own memory

# What a driver keeps for itself, for GPUs whose visible total nobody logged: nine logged totals
# lie 1.3 to 2.9 % under the reported one up to 48 GiB, and 0.60 to 0.85 GiB under it above.
VISIBLE_SHARE_SMALL = 0.985
VISIBLE_LOSS_LARGE_BYTES = 768 * MIB
LARGE_GPU_BYTES = 48 * GIB

# Of qtool's kernels; `cupy_kernels` says the same, and a test compares the two.
OLDEST_COMPUTE_CAPABILITY: Final = (7, 5)

# "24GB", which is any GPU with so much; makers write GB and mean GiB.
MEMORY_SIZE: Final = re.compile(r"\s*(\d{1,9}(?:\.\d+)?)\s*([mgt])i?b\s*", re.IGNORECASE)
GIB_IN_UNIT: Final = {"m": 1 / 1024, "g": 1.0, "t": 1024.0}
# What is taken for the size of a GPU, from less than a CUDA context to more than any rack.
LEAST_GIB: Final = 0.25
MOST_GIB: Final = 1024.0 * 1024.0
ALIKE: Final = 0.6  # of two names, from 0 to 1: less is no spelling mistake

# Words of a GPU's name that people leave out and drivers add.
BRAND_WORD = re.compile(
    r"nvidia|geforce|tesla|rtx|gtx|amd|radeon|rx|instinct|intel|apple|gpu|generation|edition"
)

NAMES_HINT: Final = (
    "names are such as '4090' or 'a100 80gb'; '24GB' is any GPU with so much memory, 'auto' those "
    "of this machine"
)

NVIDIA_SMI_FIELDS = "index,mig.mode.current,memory.total,memory.free,name"
NVIDIA_SMI_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Gpu:
    """One row of the catalogue, or one GPU of this machine.

    Sizes in MiB and peaks as in configs/gpus.toml; None where nobody published them. `basis` says
    for each number how it is known. `free_mib` is known only for GPUs of this machine.
    """

    name: str
    vendor: str
    memory_gb: float
    memory_mib: int | None
    visible_mib: int | None = None
    bandwidth_gb_s: float | None = None
    bf16_dense_tflops: float | None = None
    int8_dense_tops: float | None = None
    compute_capability: str | None = None
    year: int | None = None
    unified: bool = False
    common: bool = False
    aliases: tuple[str, ...] = ()
    basis: Mapping[str, FieldBasis] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    note: str = ""
    free_mib: int | None = None

    @property
    def short_name(self) -> str:
        """The name without the words that tell nothing apart: "RTX 4090", "A100 80GB SXM"."""
        return re.sub(r"^(NVIDIA )?(GeForce |Tesla )?", "", self.name)

    @property
    def usable_bytes(self) -> int:
        """What one program can have: the visible total, less what others use where known."""
        visible_bytes = self._visible_bytes()
        return visible_bytes if self.free_mib is None else min(visible_bytes, self.free_mib * MIB)

    @property
    def lacks_kernels(self) -> bool:
        """Whether it is known that qtool's kernels do not run there."""
        if self.vendor != "NVIDIA":
            return self.vendor not in (ANY_VENDOR, HOST_VENDOR)
        version = re.findall(r"\d+", self.compute_capability or "")
        return bool(version) and tuple(map(int, version)) < OLDEST_COMPUTE_CAPABILITY

    @property
    def memory_is_recalled(self) -> bool:
        """Whether `usable_bytes` rests on a number that nobody looked up."""
        for name in ("visible_mib", "memory_mib"):
            if getattr(self, name) is not None:
                return self.basis.get(name) == "recalled"
        return True

    @property
    def bandwidth_is_recalled(self) -> bool:
        """The same for `bandwidth_gb_s`."""
        return self.basis.get("bandwidth_gb_s") == "recalled"

    def _visible_bytes(self) -> int:
        if self.visible_mib is not None:
            return self.visible_mib * MIB
        if self.memory_mib is not None:
            reported_bytes = self.memory_mib * MIB
        else:
            reported_bytes = int(self.memory_gb * GIB)
        if reported_bytes > LARGE_GPU_BYTES:
            return reported_bytes - VISIBLE_LOSS_LARGE_BYTES
        return int(reported_bytes * VISIBLE_SHARE_SMALL)


@functools.cache
def read_catalogue() -> tuple[Gpu, ...]:
    """Every GPU of configs/gpus.toml, in file order."""
    import tomllib

    rows = tomllib.loads(config_path("gpus.toml").read_text(encoding="utf-8"))["gpu"]
    return tuple(_gpu_from_row(row) for row in rows)


def find_gpu(name: str) -> Gpu:
    """The catalogue's GPU that `name` means: "4090", "rtx4090", "a100 80gb", "H100" all do.

    Raises:
        QtoolError: (usage) no GPU or more than one fits the name; the hint lists the nearest, or
            says what names are like where none is near.
    """
    catalogue = read_catalogue()
    query = _words(name)
    for matches in (_is_spelling, _ends_name, _starts_name, _shares_words):
        found = [gpu for gpu in catalogue if query and matches(query, gpu)]
        if len(found) == 1:
            return found[0]
        if found:
            raise QtoolError(
                (Option("gpu", name), f" names {len(found)} GPUs of the catalogue"),
                kind="usage",
                hint="say which: " + ", ".join(_quoted(gpu.short_name) for gpu in found[:12]),
            )
    nearest = ", ".join(map(_quoted, _nearest("".join(query))))
    raise QtoolError(
        (Option("gpu", name), f" is not in the catalogue of {len(catalogue)} GPUs"),
        kind="usage",
        hint=f"the nearest: {nearest}" if nearest else NAMES_HINT,
    )


@dataclass(frozen=True, slots=True)
class ListedGpu:
    """One line of nvidia-smi. `index` is its own, which counts every GPU.

    `total_mib` is None where the GPU has no memory of its own, `free_mib` also where nvidia-smi may
    not tell. Of one that `is_divided` by MIG they are the whole card's, which no program can have.
    """

    index: int
    name: str
    total_mib: int | None
    free_mib: int | None
    is_divided: bool

    @property
    def has_memory(self) -> bool:
        """Whether a program can have what is listed."""
        return None not in (self.total_mib, self.free_mib) and not self.is_divided


def local_gpus() -> tuple[Gpu, ...]:
    """This machine's NVIDIA GPUs that have memory of their own, with what of it is free now.

    Raises:
        QtoolError: (not_found) no nvidia-smi, or it fails or lists no such GPU; (unsupported) MIG
            divides one.
    """
    listed = list_gpus()
    for gpu in listed:
        if gpu.is_divided:
            raise QtoolError(
                (
                    Option("gpu", "auto"),
                    f": MIG divides GPU {gpu.index} ({gpu.name}), and nvidia-smi does not list the "
                    "memory of the parts",
                ),
                kind="unsupported",
                hint=(
                    "name a GPU with as much memory, or `qtool sizing MODEL` ",
                    Option("vram", "GIB"),
                ),
            )
    gpus = tuple(gpu_of(listed_gpu) for listed_gpu in listed if listed_gpu.has_memory)
    if not gpus:
        raise _no_local_gpu("nvidia-smi lists no GPU with memory of its own")
    return gpus


def list_gpus() -> tuple[ListedGpu, ...]:
    """This machine's NVIDIA GPUs, all that nvidia-smi lists.

    Raises:
        QtoolError: (not_found) no nvidia-smi, or it fails.
    """
    import subprocess

    query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except FileNotFoundError as error:
        what = "no NVIDIA driver was found (nvidia-smi is not installed)"
        raise _no_local_gpu(what) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise _no_local_gpu(f"nvidia-smi could not be asked ({error})") from error
    lines = (_read_line(line) for line in run.stdout.splitlines())
    return tuple(gpu for gpu in lines if gpu is not None)


def resolve_gpus(names: Iterable[str]) -> tuple[Gpu, ...]:
    """The GPUs of these names, in order; "auto" stands for this machine's, "24GB" for any with so
    much memory.
    """
    gpus: list[Gpu] = []
    for name in names:
        for gpu in local_gpus() if name.strip().lower() == "auto" else (_named(name),):
            if gpu not in gpus:  # equal GPUs have equal answers
                gpus.append(gpu)
    return tuple(gpus)


def _named(name: str) -> Gpu:
    size = MEMORY_SIZE.fullmatch(name)
    if size is None:
        return find_gpu(name)
    vram_gib = float(size[1]) * GIB_IN_UNIT[size[2].lower()]
    if not LEAST_GIB <= vram_gib <= MOST_GIB:
        least, most = f"{LEAST_GIB * 1024:g}MB", f"{MOST_GIB / 1024:g}TB"
        raise QtoolError(
            (Option("gpu", name), f": expected a size from {least} to {most}"),
            kind="usage",
            hint=NAMES_HINT,
        )
    return vram_class(vram_gib)


def vram_class(vram_gib: float) -> Gpu:
    """A nameless GPU of `vram_gib` GiB as reported, for tables by memory size."""
    return Gpu(
        name=f"{vram_gib:g} GiB",
        vendor=ANY_VENDOR,
        memory_gb=vram_gib,
        memory_mib=round(vram_gib * 1024),
        basis={"memory_mib": "derived"},
    )


def _gpu_from_row(row: Mapping[str, Any]) -> Gpu:
    lists = {name: tuple(row.get(name, ())) for name in ("aliases", "sources")}
    return Gpu(**{"memory_mib": None, **row, **lists})


def _read_line(line: str) -> ListedGpu | None:
    fields = [part.strip() for part in line.split(",", 4)]
    if len(fields) != 5 or not fields[0].isdigit():
        return None  # words to people
    index, mig, total, free, name = fields
    return ListedGpu(int(index), name, _mib(total), _mib(free), mig == "Enabled")


def _mib(text: str) -> int | None:
    return int(text) if text.isdigit() else None  # unified memory prints [N/A]


def gpu_of(listed: ListedGpu) -> Gpu:
    """What is known of a GPU of this machine that has memory of its own."""
    total_mib = listed.total_mib
    assert total_mib is not None
    try:
        known = find_gpu(listed.name)
    except QtoolError:
        known = None
    return Gpu(
        name=listed.name,
        vendor="NVIDIA",
        memory_gb=round(total_mib / 1024, 1),
        memory_mib=total_mib,
        bandwidth_gb_s=known.bandwidth_gb_s if known else None,
        compute_capability=known.compute_capability if known else None,
        basis={**(known.basis if known else {}), "memory_mib": "confirmed"},
        note="this machine",
        free_mib=listed.free_mib,
    )


def _no_local_gpu(what: str) -> QtoolError:
    return QtoolError(
        (Option("gpu", "auto"), f": {what}"),
        kind="not_found",
        hint=("name a GPU instead: ", Option("gpu", "RTX 4090")),
    )


# -- names --------------------------------------------------------------------------------------


def _words(name: str) -> list[str]:
    """Lower-case words that tell GPUs apart: "NVIDIA GeForce RTX 4090" -> ["4090"]."""
    spaced = re.sub(r"(rtx|gtx|rx)(?=a?\d)", r"\1 ", name.lower())  # rtx4090
    return [word for word in re.findall(r"[a-z0-9+]+", spaced) if not BRAND_WORD.fullmatch(word)]


def _is_spelling(query: list[str], gpu: Gpu) -> bool:
    return "".join(query) in {"".join(_words(name)) for name in (gpu.name, *gpu.aliases)}


def _ends_name(query: list[str], gpu: Gpu) -> bool:
    words = _words(gpu.name)
    return "".join(query) in {"".join(words[start:]) for start in range(len(words))}


def _starts_name(query: list[str], gpu: Gpu) -> bool:
    words = _words(gpu.name)
    return "".join(query) in {"".join(words[:end]) for end in range(1, len(words) + 1)}


def _shares_words(query: list[str], gpu: Gpu) -> bool:
    return set(query) <= set(_words(gpu.name))


def _nearest(joined: str, count: int = 5) -> list[str]:
    """The names that are most like the words of a name, joined."""
    import difflib

    def likeness(gpu: Gpu) -> float:
        names = ("".join(_words(name)) for name in (gpu.name, *gpu.aliases))
        return max(difflib.SequenceMatcher(None, joined, name).ratio() for name in names)

    likenesses = {gpu.short_name: likeness(gpu) for gpu in read_catalogue()}
    alike = [name for name, value in likenesses.items() if value >= ALIKE]
    return sorted(alike, key=lambda name: likenesses[name], reverse=True)[:count]


def _quoted(name: str) -> str:
    return f"'{name}'"
