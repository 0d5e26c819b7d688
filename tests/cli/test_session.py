"""The frame around every verb: signals that nobody may miss."""

from __future__ import annotations

import subprocess
import sys

import pytest

VERB = """
import signal, sys, time
import typer
from qtool.cli.session import verb_session

class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.{name})

def verb(ctx: typer.Context):
    with verb_session(ctx, "verb", json_output=False, quiet=True, verbose=False, color="never"):
        Destroyed()
        time.sleep(2)
        print("nobody heard it")

app = typer.Typer()
app.command()(verb)
app()
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_a_destructor_still_ends_the_verb(name: str, exit_code: int) -> None:
    command = [sys.executable, "-c", VERB.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert "Exception ignored" not in done.stderr
    assert done.stderr.startswith("error: ")
