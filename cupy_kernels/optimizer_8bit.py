"""Launches optimizer_8bit.cu, optimizer_scalars.cu and store_words.cu: one step of many tensors.

    step = OptimizerStep(UpdateKind("adam", "BF16", state_bits=8), memory)
    step.write(records, stream)
    step.queue([GroupSettings(learning_rate=1e-3, beta1=0.9, beta2=0.999)], stream)

The tensors' addresses are in a table in device memory, which is rewritten by launches that carry
the words as arguments: nothing waits, and a CUDA graph keeps the words that it was captured with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from cupy_kernels.launch import Launch, ceil_div, check_aligned, cuda_dtype, num_multiprocessors
from cupy_kernels.loader import load_kernel
from qtool.formats.codebooks import dynamic_map
from qtool.formats.optimizer_states import BLOCKSIZE, slot_table

Algorithm = Literal["adam", "lion", "momentum"]

RECORD_WORDS: Final = 16  # of 8 bytes; the last seven are the kernels'
FIELDS: Final = (
    "count",
    "values",
    "gradient",
    "state1",
    "state2",
    "absmax1",
    "absmax2",
    "step",
    "group",
)
GRADIENT_WORD: Final = FIELDS.index("gradient")

RUN: Final = 4  # blocks that a warp takes in a row
MAX_WORDS: Final = 500  # arguments of a kernel are 4 KB at most
MAX_GROUPS: Final = 64
_SCALARS_THREADS: Final = 128
_STORE_THREADS: Final = 512

# Copies of the maps in shared memory; fewer where it is small. As in the .cu: the tables begin at
# 1024 bytes, two maps of 256 float32 each, and two tables of slots.
_COPIES: Final = (32, 8)
_TABLES_AT: Final = 1024


@dataclass(frozen=True, slots=True)
class UpdateKind:
    """What a kernel is made for.

    Attributes:
        dtype: of values and gradients: BF16, F16 or F32.
        state_bits: 8, or 32 for states in float32.
    """

    algorithm: Algorithm
    dtype: str
    state_bits: int


@dataclass(frozen=True, slots=True)
class TableMemory:
    """Where the table of `num_records` tensors is in device memory, as addresses.

    Attributes:
        records: int64 (num_records, RECORD_WORDS), 16-byte aligned.
        firsts: int64 (num_records,).
        codes: the words of `code_tables`, 16-byte aligned.
        num_values: of each tensor, all greater than 0.
    """

    records: int
    firsts: int
    codes: int
    num_values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Hyperparameters of the tensors whose `group` is this one's place in a sequence.

    Attributes:
        learning_rate: where `learning_rate_at` is 0.
        learning_rate_at: address of a float32 in device memory.
        beta1: momentum, for that algorithm.
        weight_decay: decoupled, but for momentum, where it is added to the gradient.
    """

    learning_rate: float
    beta1: float
    beta2: float = 0.0
    epsilon: float = 0.0
    weight_decay: float = 0.0
    learning_rate_at: int = 0


class _Group(ctypes.Structure):
    _fields_ = (
        ("learning_rate", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("learning_rate_at", ctypes.c_void_p),
    )


class _ScalarsArguments(ctypes.Structure):
    _fields_ = (
        ("records", ctypes.c_void_p),
        ("num_records", ctypes.c_int),
        ("first_group", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("groups", _Group * MAX_GROUPS),
    )


class _UpdateArguments(ctypes.Structure):
    _fields_ = (
        ("records", ctypes.c_void_p),
        ("firsts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("num_records", ctypes.c_int),
    )


class _StoreArguments(ctypes.Structure):
    _fields_ = (
        ("target", ctypes.c_void_p),
        ("run", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("count", ctypes.c_int),
        ("words", ctypes.c_int64 * MAX_WORDS),
    )


@cache
def code_tables() -> NDArray[np.uint32]:
    """uint32 (6912,): what every launch finds at `TableMemory.codes`; the same on every device."""
    maps = [dynamic_map(signed).view(np.uint32) for signed in (True, False)]
    return np.concatenate([*maps, slot_table(True), slot_table(False)])


def threads_for(compute_capability: int) -> int:
    """Of a thread block, the only one of its multiprocessor: as many as two states have registers
    for, which are 72 up to 9.0 (written 90) and 80 from 10.0 on."""
    return 896 if compute_capability < 100 else 768


def specialise(kind: UpdateKind, copies: int, threads: int) -> dict[str, Any]:
    """The macros of optimizer_8bit.cu.

    Raises:
        ValueError: an unknown dtype or number of bits.
    """
    if kind.state_bits not in (8, 32):
        raise ValueError(f"states of {kind.state_bits} bits: 8 and 32 are known")
    return {
        "ALGORITHM": kind.algorithm.upper(),
        "SOURCE": cuda_dtype(kind.dtype),
        "STATE_BITS": kind.state_bits,
        "COPIES": copies,
        "THREADS": threads,
        "RUN": RUN,
    }


def shared_bytes(copies: int) -> int:
    """Shared memory of a thread block with 8-bit states."""
    maps = dynamic_map().nbytes * 2 * copies
    return _TABLES_AT + maps + 2 * slot_table(True).nbytes


class OptimizerStep:
    """A table of tensors, and the launches of a step of all of them, on the current device.

    Args:
        memory: it is written by `write` before the first step, and stays in use.
    """

    def __init__(self, kind: UpdateKind, memory: TableMemory) -> None:
        check_aligned(records=memory.records, codes=memory.codes)
        num_records = len(memory.num_values)
        self._memory = memory
        self._firsts, num_runs = _first_runs(memory.num_values)
        self._store = _store_launch()
        kernel = load_kernel(
            "optimizer_scalars", ALGORITHM=kind.algorithm.upper(), MAX_GROUPS=MAX_GROUPS
        )
        scalars = _ScalarsArguments(records=memory.records, num_records=num_records)
        grid = (ceil_div(num_records, _SCALARS_THREADS),)
        self._scalars = Launch(kernel, grid, _SCALARS_THREADS, 0, scalars, overlap=False)
        self._update = _update_launch(kind, memory, num_runs)

    def write(self, records: NDArray[np.int64], stream: int) -> None:
        """Queue writing the whole table: `records` (num_records, len(FIELDS))."""
        memory = self._memory
        self._write(memory.records, records, RECORD_WORDS, stream)
        self._write(memory.firsts, self._firsts[:, None], 1, stream)

    def write_gradients(self, gradients: NDArray[np.int64], stream: int) -> None:
        """Queue writing the addresses of the gradients (num_records,) alone; 0 for none."""
        target = self._memory.records + 8 * GRADIENT_WORD
        self._write(target, gradients[:, None], RECORD_WORDS, stream)

    def queue(self, groups: Sequence[GroupSettings], stream: int) -> None:
        """Queue a step of all tensors that have a gradient.

        Raises:
            RuntimeError: the driver refuses, or reports an earlier failure.
        """
        arguments = self._scalars.arguments
        for first in range(0, len(groups), MAX_GROUPS):
            some = groups[first : first + MAX_GROUPS]
            arguments.first_group, arguments.num_groups = first, len(some)
            for i, group in enumerate(some):
                arguments.groups[i] = astuple(group)
            self._scalars(stream)
        self._update(stream)

    def _write(self, target: int, rows: NDArray[np.int64], stride: int, stream: int) -> None:
        """Row i of `rows` goes to target + 8 * stride * i."""
        store, width = self._store, rows.shape[1]
        step = MAX_WORDS // width
        for first in range(0, len(rows), step):
            words = np.ascontiguousarray(rows[first : first + step])
            arguments = store.arguments
            arguments.target = target + 8 * stride * first
            arguments.run, arguments.stride, arguments.count = width, stride, words.size
            ctypes.memmove(arguments.words, words.ctypes.data, words.nbytes)
            store(stream)


def _first_runs(num_values: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """The number of each tensor's first run, and of all runs."""
    runs = [ceil_div(count, RUN * BLOCKSIZE) for count in num_values]
    ends = np.cumsum(runs, dtype=np.int64)
    return ends - np.array(runs, np.int64), int(ends[-1])


def _update_launch(kind: UpdateKind, memory: TableMemory, num_runs: int) -> Launch:
    import cupy

    copies, threads = _copies(), threads_for(int(cupy.cuda.Device().compute_capability))
    kernel = load_kernel("optimizer_8bit", **specialise(kind, copies, threads))
    arguments = _UpdateArguments(
        records=memory.records,
        firsts=memory.firsts,
        tables=memory.codes,
        num_runs=num_runs,
        num_records=len(memory.num_values),
    )
    shared = shared_bytes(copies) if kind.state_bits == 8 else 0
    # A thread block per multiprocessor: it fills its tables once.
    grid = (min(ceil_div(num_runs, threads // 32), num_multiprocessors()),)
    return Launch(kernel, grid, threads, shared, arguments, overlap=False)


def _store_launch() -> Launch:
    kernel = load_kernel("store_words", MAX_WORDS=MAX_WORDS)
    return Launch(kernel, (1,), _STORE_THREADS, 0, _StoreArguments(), overlap=False)


def _copies() -> int:
    """As many as a thread block of the current device has shared memory for."""
    import cupy

    available = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    return next(copies for copies in _COPIES if shared_bytes(copies) <= available)
