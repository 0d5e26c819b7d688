"""A step of one token on the processor: tasks made once, run by a few threads, see `cpu_threads`.

Per block tasks follow one another, each cut into items: (norm; query, key and value), (rotary
embedding, cache, attention), (output, residual), (norm; gate and up, activation), (down, residual);
before them comes the embedding, behind them (norm, head). To a long text heads attend strip by
strip, and one more task adds the strips up.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.backends import cpu_records as at
from qtool.backends import cpu_threads
from qtool.backends.cpu_attention import merge_operator
from qtool.runtime.decoders.blocks import FusableNetwork, NotFusable
from qtool.runtime.decoders.caches import CAPACITY_STEP, GrowingLayer
from qtool.runtime.decoders.fused_attention import _angles, _traits, check_rotary
from qtool.runtime.decoders.host_tasks import Angles, Task, TaskMaker
from qtool.runtime.products_host import pool_of_threads

# Below, another thread takes longer to meet than it saves.
MIN_ELEMENTS_PER_THREAD: Final = 1 << 21
_LINE_BYTES: Final = 64


class StepLayer(GrowingLayer):
    """A layer of the cache whose buffers the step fills itself.

    What the step puts in shows to others after a `rewind` to behind it.
    """

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, room, head_dim), with what is not filled."""
        return self._key_buffer, self._value_buffer

    def make_room(self, length: int) -> None:
        """See that the buffers hold `length` tokens; all they held stays."""
        if length > self._key_buffer.shape[-2]:
            self._key_buffer = _longer(self._key_buffer, length)
            self._value_buffer = _longer(self._value_buffer, length)


def _longer(buffer: Tensor, length: int) -> Tensor:
    batch, heads, room, head_dim = buffer.shape
    longer = buffer.new_empty(batch, heads, max(2 * room, length, CAPACITY_STEP), head_dim)
    longer[:, :, :room] = buffer
    return longer


class HostStep:
    """The step of a network over a cache of `StepLayer`s, for one sequence.

    Args:
        capacity: positions are below it.
        num_threads: the most that work, the caller's among them.

    Attributes:
        logits: float32 (1, vocabulary), rounded as the model rounds; each step fills it anew.

    Raises:
        NotFusable: a kind of attention that the step does not know.
    """

    def __init__(
        self, model: Any, network: FusableNetwork, *, capacity: int, num_threads: int
    ) -> None:
        self._network = network
        self._num_threads = min(num_threads, _most_threads(network))
        self.logits = torch.zeros(1, network.head.weight.rows)
        angles = _angles_of(model, network, capacity)
        self._maker = TaskMaker(network, angles, capacity=capacity, num_threads=self._num_threads)
        self._tasks = list(self._maker.tasks(self.logits))
        self._records = _records(self._tasks)
        self._control = _aligned(cpu_threads.CONTROL_SIZE)
        # Asked for once: they cost more than the calls that they are for.
        self._control_at = self._control.ctypes.data
        self._scratches = [_scratch(self._maker.scratch_floats) for _ in range(self._num_threads)]
        self._scratches_at = [scratch.ctypes.data for scratch in self._scratches]
        self._helpers: list[Future[None] | None] = [None] * (self._num_threads - 1)
        # Attention tasks go in pairs: strips, and what merges them.
        merge = merge_operator()
        self._merges = [i for i, task in enumerate(self._tasks) if task.operator is merge]
        self._num_items = 0
        self._num_strips = 0  # where no window is in the way
        self._room = 0

    def run(self, token: int, position: int, layers: Sequence[StepLayer]) -> Tensor:
        """Take up `token` at `position`; the logits of what follows."""
        if position >= self._room:
            self._look_at_cache(layers, position)
        self._cut_into_strips(position)
        control = self._control
        control[cpu_threads.TOKEN], control[cpu_threads.POSITION] = token, position
        if cpu_threads.begin_step(self._control_at, self._num_items) < len(self._helpers):
            self._call_helpers()
        cpu_threads.run_step(self._control_at, self._scratches_at[0])
        return self.logits

    def cache_changed(self) -> None:
        """There is another cache, or others put something in."""
        self._room = 0

    # -- threads ----------------------------------------------------------------------------------

    def _call_helpers(self) -> None:
        pool = pool_of_threads(len(self._helpers))
        for number, helper in enumerate(self._helpers):
            if helper is None or helper.done():
                self._helpers[number] = pool.submit(self._help, number + 1)

    def _help(self, number: int) -> None:
        cpu_threads.help_with_steps(self._control_at, self._scratches_at[number])

    # -- what changes from step to step -----------------------------------------------------------

    def _look_at_cache(self, layers: Sequence[StepLayer], position: int) -> None:
        """Make room for the token, and tell the tasks where keys and values lie."""
        for index, layer in zip(self._merges, layers, strict=True):
            layer.make_room(position + 1)
            keys, values = layer.buffers
            self._room = keys.shape[2]
            record = self._records[index - 1]
            record[at.KEYS], record[at.VALUES] = keys.data_ptr(), values.data_ptr()
            record[at.HEAD_STRIDE] = keys.stride(1)

    def _cut_into_strips(self, position: int) -> None:
        """As many as are seen from `position`."""
        num_strips = position // at.STRIP + 1
        if num_strips == self._num_strips:
            return
        self._num_strips, num_heads = num_strips, self._network.num_kv_heads
        for index, block in zip(self._merges, self._network.blocks, strict=True):
            window = block.attention.window or position + 1
            num = min(num_strips, -(-window // at.STRIP))
            self._records[[index - 1, index], at.NUM_STRIPS] = num
            self._tasks[index - 1].num_items = num * num_heads
            self._tasks[index].num_items = num_heads if num > 1 else 0
        self._table = _table(self._tasks, self._records)
        self._num_items = int(self._table[-1, cpu_threads.FIRST])
        self._control[cpu_threads.TASKS] = self._table.ctypes.data


# -- making it ------------------------------------------------------------------------------------


def _most_threads(network: FusableNetwork) -> int:
    """That are worth waking."""
    layers = [network.head]
    for block in network.blocks:
        layers += [*block.query_key_value, block.output, *block.gate_up, block.down]
    num_elements = sum(layer.weight.rows * layer.kind.columns for layer in layers)
    return max(num_elements // MIN_ELEMENTS_PER_THREAD, 1)


def _angles_of(model: Any, network: FusableNetwork, capacity: int) -> Angles:
    check_rotary(model)
    for block in network.blocks:
        _traits(block.attention)  # refuses a norm of queries or keys alone
    if network.num_heads % network.num_kv_heads:
        raise NotFusable(f"{network.num_heads} query heads for {network.num_kv_heads} key heads")
    kinds = {block.attention.layer_type for block in network.blocks}
    tables = {kind: _angles(model, kind, capacity, network.dtype) for kind in kinds}
    (half,) = {cosines.shape[1] for cosines, _ in tables.values()}
    return Angles(2 * half, tables)


def _records(tasks: Sequence[Task]) -> NDArray[np.int64]:
    records = np.zeros((len(tasks), at.RECORD_FIELDS), np.int64)
    for row, task in zip(records, tasks, strict=True):
        row[list(task.record)] = list(task.record.values())
    return records


def _table(tasks: Sequence[Task], records: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows that `cpu_threads` takes; the last has the number of all items."""
    table = np.zeros((len(tasks) + 1, cpu_threads.TASK_FIELDS), np.int64)
    first = depends = beside = 0
    for row, record, task in zip(table, records, tasks, strict=False):
        depends = first if task.follows else depends
        row[:] = first, depends, task.operator.address, record.ctypes.data
        if task.awaits:
            record[at.INNER_DONE] = beside
        first += task.num_items
        beside = first if task.follows else beside
    table[-1, cpu_threads.FIRST] = first
    return table


def _scratch(num_floats: Sequence[int]) -> NDArray[np.int64]:
    """A thread's own memory: what x is arranged for, addresses of places, the places."""
    sizes = [-(-4 * num // _LINE_BYTES) * _LINE_BYTES for num in num_floats]
    start = 8 * at.SCRATCH_FIELDS
    scratch = _aligned((start + sum(sizes)) // 8)
    addresses = scratch.ctypes.data + start + np.cumsum([0, *sizes[:-1]])
    scratch[1 : len(sizes) + 1] = addresses
    return scratch


def _aligned(size: int) -> NDArray[np.int64]:
    """Zeros int64 (size,) from the start of a cache line on."""
    extra = _LINE_BYTES // 8
    memory = np.zeros(size + extra, np.int64)
    first = -memory.ctypes.data % _LINE_BYTES // 8
    return memory[first : first + size]
