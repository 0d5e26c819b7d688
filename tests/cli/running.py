"""Runs the command line inside the test process, as `main` would be run by a shell."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from qtool.cli import main


@dataclass(frozen=True, slots=True)
class Ran:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as one JSON document; fails if anything else is on it."""
        return json.loads(self.stdout)

    @property
    def error(self) -> dict[str, str]:
        """The error document on stderr."""
        return json.loads(self.stderr.splitlines()[-1])["error"]


def run(*arguments: object) -> Ran:
    """Run `qtool ARGUMENTS` and return what came out."""
    stdout, stderr = io.StringIO(), io.StringIO()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    with (
        mock.patch.object(sys, "argv", ["qtool", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return Ran(code, stdout.getvalue(), stderr.getvalue())
