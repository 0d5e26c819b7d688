"""qtool: does this language model fit my GPU? Plan its memory, quantize, inspect, run and train it.

    import qtool

    model = qtool.load("org/model", quant="nf4-dq")
    for piece in qtool.stream(model, "Why is the sky blue?"):
        print(piece, end="", flush=True)

`load`, `stream`, `release`, `register` and `unregister` need the extra `qtool[run]`; docs/python.md
shows them at work. Importing this package imports neither torch, transformers nor cupy; see
docs/architecture.md for the direction of imports.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own is an import, and the program starts with none: see qtool.cli
if TYPE_CHECKING:
    from typing import Any

    from qtool.errors import QtoolError
    from qtool.runtime.api import load, register, release, stream, unregister

__version__ = "0.1.0"
__all__ = ["QtoolError", "load", "register", "release", "stream", "unregister"]


def __getattr__(name: str) -> Any:
    """The error, and the functions that run models, imported when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "QtoolError":
        from qtool.errors import QtoolError

        return QtoolError
    from qtool.runtime.requirements import require_run_extra

    require_run_extra()
    from qtool.runtime import api

    globals()[name] = getattr(api, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
