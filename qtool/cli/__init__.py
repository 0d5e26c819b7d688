"""The command line: one module per verb that parses, calls one function and reports. No logic.

Nothing heavy is imported before a verb runs; verbs import their packages inside the command.
"""

from __future__ import annotations

from qtool.cli.app import main

__all__ = ["main"]
