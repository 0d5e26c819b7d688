"""How a few threads share the work of a step, without Python between its parts.

A step is a list of tasks, each of some items. Threads draw tickets, one per item, in the order of
the tasks; an item waits until those that its task depends on are done. Whoever comes late finds
less to do, and nobody waits for it. So there is no barrier that all threads must reach, and a step
ends even if its caller is the only one.

Tasks are int64 rows: first ticket, items that must be done before, the operator, its record. An
operator is compiled code that other code calls by its address:

    operator(control, record, item, scratch)    addresses, and which item of the task

`scratch` belongs to the thread. `control` is an array of int64 that all threads share; the named
places lie on cache lines of their own where several threads write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from qtool.backends.cpu_kernels import helper, inlined, kernel
from qtool.backends.cpu_vectors import Emit, array_at

# Places in `control`.
TICKET: Final = 0  # the next one; the number of the step stands in its upper half
DONE: Final = 8  # items
HELPERS: Final = 16  # threads that look for work
LIMIT: Final = 24  # the first ticket that there is not, under the number of the step
TASKS: Final = 25  # address of the rows
STEP: Final = 26  # its number
TOKEN: Final = 27
POSITION: Final = 28
CONTROL_SIZE: Final = 32

TASK_FIELDS: Final = 4
FIRST, DEPENDS, OPERATOR, RECORD = range(TASK_FIELDS)

STEP_SHIFT: Final = 32
_TICKET_MASK: Final = (1 << STEP_SHIFT) - 1
# A pause takes 10 to 50 ns. Waiting threads let others run after a while, for there may be more
# threads than processors; helpers look for the next step about as long as Python needs between two.
_PAUSES_BEFORE_YIELD: Final = 2000
_PAUSES_BEFORE_LEAVING: Final = 20_000

_OPERATOR_TYPE: Final = types.void(types.intp, types.intp, types.intp, types.intp)
_INT64: Final = ir.IntType(64)
_yield_to_others = types.ExternalFunction("sched_yield", types.int32())


def operator(function: Callable[..., None]) -> Any:
    """Compile what tasks call, now; its `address` is for them. Cached on disk like a kernel."""
    function = _of_this_version(function)
    try:
        compiled = cfunc(_OPERATOR_TYPE, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no place for the cache
        compiled = cfunc(_OPERATOR_TYPE, error_model="numpy")(function)
    return compiled


def _of_this_version(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, cached under a name that changes with all that it may be made of.

    Numba looks at the file alone in which a function stands; these are made of others' too.
    """
    function.__qualname__ += f"-{_version()}"
    return function


@cache
def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# ---- Atomics and calls ------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _add(typing: Any, address: Any, value: Any) -> tuple[Any, Emit]:
    """Add to the int64 at an address; what it was before."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, operands[0]), operands[1], "seq_cst")

    return types.int64(types.intp, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _load(typing: Any, address: Any) -> tuple[Any, Emit]:
    """The int64 at an address, and all that was written before it."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.load_atomic(_pointer(builder, operands[0]), "seq_cst", 8)

    return types.int64(types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def _store(typing: Any, address: Any, value: Any) -> tuple[Any, Emit]:
    """Write an int64 behind all that was written before it."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        builder.store_atomic(operands[1], _pointer(builder, operands[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _call(
    typing: Any, function: Any, control: Any, record: Any, item: Any, scratch: Any
) -> tuple[Any, Emit]:
    """Call an operator by its address."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_INT64] * 4)
        function = builder.inttoptr(operands[0], function_type.as_pointer())
        builder.call(function, operands[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), emit


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing: Any) -> tuple[Any, Emit]:
    """Tell the processor that this thread waits."""

    def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        triple = context.codegen().magic_tuple()[0]
        if triple.startswith(("x86_64", "i686")):
            pause = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, pause, name), [])
        return context.get_dummy_value()

    return types.void(), emit


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT64.as_pointer())


# ---- Steps ------------------------------------------------------------------------------------


@helper
def _work(control: int, scratch: int) -> None:
    """Draw tickets until there are no more."""
    shared = array_at(control, np.int64)
    task = np.int64(0)
    while True:
        drawn = _add(control + 8 * TICKET, 1)
        limit = _load(control + 8 * LIMIT)
        # A ticket drawn before a step that has begun meanwhile is none of its.
        if drawn >= limit or drawn >> STEP_SHIFT != limit >> STEP_SHIFT:
            return
        tasks = array_at(shared[TASKS], np.int64)
        ticket = drawn & _TICKET_MASK
        # The thread may go on from the end of a step into the next.
        if ticket < tasks[np.uint64(task * TASK_FIELDS + FIRST)]:
            task = np.int64(0)
        while ticket >= tasks[np.uint64((task + 1) * TASK_FIELDS + FIRST)]:
            task += 1
        at = np.uint64(task * TASK_FIELDS)
        wait_for(control, tasks[at + np.uint64(DEPENDS)])
        item = ticket - tasks[at + np.uint64(FIRST)]
        record = tasks[at + np.uint64(RECORD)]
        _call(tasks[at + np.uint64(OPERATOR)], control, record, item, scratch)
        _add(control + 8 * DONE, 1)


@inlined
def _has_work(control: int) -> Any:
    ticket, limit = _load(control + 8 * TICKET), _load(control + 8 * LIMIT)
    return ticket < limit and ticket >> STEP_SHIFT == limit >> STEP_SHIFT


@inlined
def wait_for(control: int, num_done: int) -> None:
    """Wait until so many items of the step are done; those whose tickets were drawn before."""
    pauses = 0
    while _load(control + 8 * DONE) < num_done:
        _pause()
        pauses += 1
        if pauses == _PAUSES_BEFORE_YIELD:
            _yield_to_others()
            pauses = 0


@kernel
@_of_this_version
def run_step(control: int, scratch: int) -> None:
    """Work until all of the step is done."""
    limit = array_at(control, np.int64)[LIMIT]
    _work(control, scratch)
    wait_for(control, limit & _TICKET_MASK)


@kernel
@_of_this_version
def help_with_steps(control: int, scratch: int) -> None:
    """Work on this step and the following ones, until for a while none has come."""
    helpers = control + 8 * HELPERS
    _add(helpers, 1)
    pauses = 0
    while pauses < _PAUSES_BEFORE_LEAVING:
        if _has_work(control):
            _work(control, scratch)
            pauses = 0
        _pause()
        pauses += 1
        if pauses == _PAUSES_BEFORE_LEAVING:
            _add(helpers, -1)
            # The caller looks for helpers after it has handed out tickets: one of both sees.
            if _has_work(control):
                _add(helpers, 1)
                pauses = 0


@kernel
@_of_this_version
def begin_step(control: int, num_items: int) -> Any:
    """Hand out the tickets of a step whose tasks are ready; how many helpers look for work."""
    shared = array_at(control, np.int64)
    shared[STEP] += 1
    first = shared[STEP] << STEP_SHIFT
    _store(control + 8 * DONE, 0)
    _store(control + 8 * LIMIT, first + num_items)
    _store(control + 8 * TICKET, first)
    return _load(control + 8 * HELPERS)
