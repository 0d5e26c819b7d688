"""The frame around every verb: signals that nobody may miss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.cli import EXIT_INTERRUPTED
from qtool.errors import EXIT_CODES
from tests.cli.running import run

DEMO = Path(__file__).parent.parent.parent / "qtool/demo_model"

VERB = """
import signal, sys, time
import typer
from qtool.cli.session import verb_session

class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.{name})

def verb(ctx: typer.Context):
    with verb_session(
        ctx, "verb", json_output=False, quiet=False, verbose=False, color="never"
    ) as show:
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


WITH_A_POOL = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor

POOL = ThreadPoolExecutor(1)

def signal_after(function, caller):
    def trace(frame, event, _):
        if event == "return" and frame.f_back.f_code.co_name == caller:
            sys.settrace(None)
            signal.raise_signal(signal.{name})
        return trace if frame.f_code is function.__code__ else None
    sys.settrace(trace)
"""


def run_verb(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("function", "caller"),
    [
        ("threading.Condition.__enter__", "result"),  # would leave a future's lock to nobody
        ("threading.Thread.start", "_adjust_thread_count"),  # a thread that its pool knows not
    ],
)
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_leaves_no_thread_waiting_for_ever(
    function: str, caller: str, name: str, exit_code: int
) -> None:
    body = f"signal_after({function}, '{caller}')\n        POOL.submit(time.sleep, 1).result()\n"
    program = (WITH_A_POOL + VERB.replace("Destroyed()\n", body)).format(name=name)
    done = run_verb(program)
    assert (done.returncode, done.stdout) == (exit_code, "")


WITH_AN_EAGER_READER = """
import signal, sys

class Stderr:
    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

    def write(self, text):
        sys.__stderr__.write(text)
        if "a note" in text:
            signal.raise_signal(signal.{name})

sys.stderr = Stderr()
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_line_that_a_signal_meets_is_printed_once(name: str, exit_code: int) -> None:
    verb = VERB.replace("Destroyed()\n", "show.note('a note')\n")
    done = run_verb((WITH_AN_EAGER_READER + verb).format(name=name))
    assert (done.returncode, done.stdout) == (exit_code, "")
    note, error, *_ = done.stderr.splitlines()
    assert note == "a note"
    assert error.startswith("error: ")


@pytest.mark.parametrize("after", ["", "raise typer.Exit(0)\n"])
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_meets_the_last_line_is_heard(name: str, exit_code: int, after: str) -> None:
    body = 'Destroyed()\n        time.sleep(2)\n        print("nobody heard it")\n'
    assert body in VERB
    verb = VERB.replace(body, f"show.note('a note')\n        {after}\n")
    done = run_verb((WITH_AN_EAGER_READER + verb).format(name=name))
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr.startswith("a note\nerror: ")


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_is_sent_twice_is_one(name: str, exit_code: int) -> None:
    """As `timeout` does; whoever cleans up after the first must not be stopped by the second."""
    body = (
        "try:\n            signal.raise_signal(signal.{name})\n"
        "        finally:\n            signal.raise_signal(signal.{name})\n"
        "            print('cleaned up')\n"
    )
    done = run_verb(VERB.replace("Destroyed()\n", body).format(name=name))
    assert (done.returncode, done.stdout) == (exit_code, "cleaned up\n")
    assert done.stderr.startswith("error: ")


def test_another_signal_is_heard_while_the_first_is_answered() -> None:
    body = (
        "try:\n            signal.raise_signal(signal.{name})\n"
        "        finally:\n            time.sleep(0.1)\n"
        "            signal.raise_signal(signal.{name})\n            print('cleaned up')\n"
    )
    done = run_verb(VERB.replace("Destroyed()\n", body).format(name="SIGINT"))
    assert (done.returncode, done.stdout) == (130, "")


STARTING = """
import __future__, re, signal, sys  # as Python and an installed script have them by then

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name not in ("qtool", "qtool.cli"):
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["qtool", "--version"]
from qtool.cli import main
main()
"""


def test_ctrl_c_while_qtool_starts_shows_no_traceback() -> None:
    """Whichever module is the first to be imported beside these two."""
    done = run_verb(STARTING)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_exit_code_that_the_start_knows_by_heart_is_the_contracts() -> None:
    assert EXIT_CODES["interrupted"] == EXIT_INTERRUPTED


CONTINUES, BEGINS = "; it continues where it stopped", "; it begins anew"
IMPORTED = """
import signal, time
try:
    signal.raise_signal(signal.{name})
    deadline = time.monotonic() + {seconds}
    while time.monotonic() < deadline:
        time.sleep(0.01)
except BaseException:
    pass
"""


@pytest.mark.parametrize("seconds", [0.2, 5.0])
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_module_that_catches_everything_hides_no_signal(
    tmp_path: Path, name: str, exit_code: int, seconds: float
) -> None:
    (tmp_path / "catching.py").write_text(IMPORTED.format(name=name, seconds=seconds))
    program = VERB.replace("Destroyed()\n", "import catching\n").format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    if seconds < 1:  # the import was over in time
        assert done.returncode == exit_code and done.stdout == ""
    else:  # it was told after a second, and did not listen
        assert done.returncode == 0


@pytest.mark.parametrize(
    ("name", "exit_code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_an_import_that_was_left_halfway_is_no_bug_of_ours(
    name: str, exit_code: int, word: str
) -> None:
    program = VERB.replace(
        "        Destroyed()\n",
        "        try:\n            signal.raise_signal(signal.{name})\n"
        "        except KeyboardInterrupt:\n            raise ImportError('halfway') from None\n",
    ).format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == exit_code
    assert done.stderr.startswith(f"error: {word}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_is_ignored_stays_so(name: str) -> None:
    raising = VERB.replace("Destroyed()\n", f"signal.raise_signal(signal.{name})\n")
    program = f"import signal\nsignal.signal(signal.{name}, signal.SIG_IGN)\n{raising}"
    done = subprocess.run(
        [sys.executable, "-c", program.replace("time.sleep(2)", "pass").format(name=name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == "nobody heard it\n"


@pytest.mark.parametrize(
    ("verb", "function", "arguments", "how"),
    [
        ("estimate", "qtool.checkpoint.open.open_checkpoint", (DEMO,), ""),
        ("sizing", "qtool.planner.sizing.size_models", (), ""),
        ("inspect", "qtool.inspection.command.inspect_path", (DEMO,), ""),
        ("doctor", "qtool.doctor.run_checks", (), ""),
        ("demo", "qtool.demo.open_demo", (), ""),
        ("generate", "qtool.runtime.loading.load_model", (DEMO, "Hi"), ""),
        (
            "finetune",
            "qtool.finetune.run.prepare",
            (DEMO, "rows.txt", "-o", "out"),
            " with --resume",
        ),
        ("finetune", "qtool.finetune.run.prepare", (DEMO, "rows.txt", "-o", "o", "--dry-run"), ""),
        ("quantize", "qtool.quantize.command.plan_request", (DEMO, "-o", "begun"), CONTINUES),
        ("quantize", "qtool.quantize.command.plan_request", (DEMO, "-o", "new"), BEGINS),
        ("quantize", "qtool.quantize.command.plan_request", (DEMO, "--dry-run"), ""),
        ("merge", "qtool.merge.command.plan_merge", ("adapter", "-o", "begun"), CONTINUES),
        ("merge", "qtool.merge.command.plan_merge", ("adapter", "-o", "new"), BEGINS),
        ("merge", "qtool.merge.command.plan_merge", ("adapter", "-o", "o", "--restart"), ""),
        ("merge", "qtool.merge.command.plan_merge", ("adapter", "-o", "out", "--dry-run"), ""),
    ],
)
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_a_signal_hints_at_is_true_of_the_command(
    verb: str,
    function: str,
    arguments: tuple[object, ...],
    how: str,
    name: str,
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = getattr(signal, name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    monkeypatch.setattr(function, lambda *_, **__: signal.raise_signal(number))
    ran = run(verb, *arguments, "--json")
    assert (ran.exit_code, ran.error["kind"]) == (exit_code, "interrupted")
    assert ran.error["hint"] == f"run the command again{how}"


def run_version_with(folder: Path) -> subprocess.CompletedProcess[str]:
    """`qtool --version` in a process that begins with the folder's sitecustomize.py."""
    return subprocess.run(
        [sys.executable, "-m", "qtool", "--version"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )


def test_an_interruption_before_any_verb_shows_no_traceback(tmp_path: Path) -> None:
    """The command line's own imports take a while, in which somebody may think twice."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            import signal\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = run_version_with(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interruption_after_the_verb_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal\natexit.register(signal.raise_signal, signal.SIGINT)\n"
    )
    done = run_version_with(tmp_path)
    assert (done.returncode, done.stderr) == (130, "")
