"""stdout that takes no more: a full disk, a closed pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.merge.adapters import linear_layers, lora_tensors, write_adapter

pytestmark = pytest.mark.usefixtures("enough_memory")

DEMO = Path(__file__).parent.parent.parent / "qtool/demo_model"
PROGRAM = (sys.executable, "-m", "qtool")
KERNELS = ("bench", "kernels", "--backend", "cpu", "--op", "dequantize nf4", "--no-rival")
SMALL = ("--shape", "256x256")


def into(path: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program as a shell does, stdout buffered and going to `path`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path(path).open("w") as stdout:
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=300,
            env=environment,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stdout")
    assert run("quantize", DEMO, "-o", folder / "packed").exit_code == 0
    (folder / "rows.jsonl").write_text('{"text": "Once upon a time there was a girl."}\n' * 8)
    config = json.loads((DEMO / "config.json").read_text())
    write_adapter(folder / "adapter", lora_tensors(linear_layers(config)), DEMO)
    return folder


COMMANDS = {
    "no verb": (),
    "help": ("--help",),
    "a verb's help": ("estimate", "--help"),
    "version": ("--version",),
    "estimate": ("estimate", DEMO),
    "sizing": ("sizing",),
    "quantize": ("quantize", DEMO, "-o", "@quantized"),
    "quantize --dry-run": ("quantize", DEMO, "--dry-run"),
    "inspect": ("inspect", "@packed"),
    "inspect --verify": ("inspect", "@packed", "--verify"),
    "doctor": ("doctor",),
    "generate": ("generate", "@packed", "ROMEO:", "--max-new-tokens", 4),
    "finetune": (
        *("finetune", DEMO, "@rows.jsonl", "-o", "@lora", "--max-steps", 1, "--batch", 1),
        *("--grad-accum", 1, "--max-length", 16, "--resume", "--force"),
    ),
    "finetune --dry-run": (
        *("finetune", DEMO, "@rows.jsonl", "-o", "@never"),
        *("--dry-run", "--force"),
    ),
    "merge": ("merge", "@adapter", "-o", "@merged", "--no-check"),
    "merge --dry-run": ("merge", "@adapter", "-o", "@never", "--dry-run"),
    "bench kernels": (*KERNELS, *SMALL),
}
WITHOUT_JSON = ("no verb", "help", "a verb's help", "version")


@pytest.mark.parametrize(
    ("name", "is_json"),
    [
        *((name, False) for name in COMMANDS),
        *((name, True) for name in COMMANDS if name not in WITHOUT_JSON),
    ],
)
def test_a_full_disk_is_an_error(name: str, is_json: bool, folder: Path) -> None:
    arguments = [folder / str(a)[1:] if str(a)[:1] == "@" else a for a in COMMANDS[name]]
    ran = into("/dev/full", *arguments, *["--json"] * is_json)
    assert ran.returncode == 5, ran.stderr
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr
    if is_json:
        error = json.loads(ran.stderr.splitlines()[-1])["error"]
        assert error["kind"] == "no_space"
        assert error["message"].startswith("stdout: no space left")
    else:
        assert "error: stdout: no space left on the device" in ran.stderr
        again = "with --resume" if name == "finetune" else "run the command again"
        assert again in ran.stderr
    assert not (folder / "never").exists()


def without_free_memory(text: str) -> str:
    """`text` without how much of this machine's memory is free, which changes between two runs."""
    return re.sub(r"fits [\d.]+ [KMGT]iB of", "fits _ of", text)


@pytest.mark.parametrize(
    "name", ["estimate", "sizing", "inspect", *(it for it in COMMANDS if it.endswith("--dry-run"))]
)
def test_quiet_is_the_whole_answer_and_nothing_else(name: str, folder: Path) -> None:
    arguments = [folder / str(a)[1:] if str(a)[:1] == "@" else a for a in COMMANDS[name]]
    quiet, usual = run(*arguments, "--quiet"), run(*arguments)
    assert quiet.stderr == "" and usual.stdout != ""
    assert without_free_memory(quiet.stdout) == without_free_memory(usual.stdout)
    assert name not in ("estimate", "quantize --dry-run") or usual.stderr != ""


def test_what_was_measured_is_kept_where_stdout_takes_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kernels.json"
    assert into("/dev/full", *KERNELS, *SMALL, "--output", kept).returncode == 5
    document = json.loads(kept.read_text())
    assert document["command"] == "bench kernels" and document["rows"]
    assert list(tmp_path.iterdir()) == [kept]


def test_a_full_disk_does_not_hide_the_first_error(tmp_path: Path) -> None:
    ran = into("/dev/full", "estimate", tmp_path / "none", "--json")
    assert ran.returncode == 1
    assert json.loads(ran.stderr)["error"]["kind"] == "not_found"


def without_a_reader(*arguments: object, both: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the program into a pipe whose other end is closed; `both`: as `2>&1 |` does."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            stdout=writing,
            stderr=writing if both else subprocess.PIPE,
            text=True,
            check=False,
            timeout=300,
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    ("name", "is_json"),
    [
        *((name, False) for name in COMMANDS),
        *((name, True) for name in COMMANDS if name not in WITHOUT_JSON),
    ],
)
def test_a_reader_that_is_gone_is_no_news(name: str, is_json: bool, folder: Path) -> None:
    """As after `| head -1`: what the shell itself says of a program that such a pipe ended."""
    arguments = [folder / str(a)[1:] if str(a)[:1] == "@" else a for a in COMMANDS[name]]
    ran = without_a_reader(*arguments, *["--json"] * is_json)
    assert ran.returncode == 141, ran.stderr
    assert "Error" not in ran.stderr and "error: " not in ran.stderr and "hint" not in ran.stderr
    assert not is_json or ran.stderr == ""


@pytest.mark.parametrize("flags", [(), ("--verbose",), ("--json",)])
def test_a_log_that_nobody_reads_ends_no_work(flags: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert without_a_reader("quantize", DEMO, "-o", out, *flags, both=True).returncode == 141
    assert run("inspect", out, "--verify").exit_code == 0
    assert without_a_reader("estimate", tmp_path / "none", *flags, both=True).returncode == 1


def test_a_log_that_is_full_ends_no_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as log:
        ran = subprocess.run(
            [*PROGRAM, "quantize", str(DEMO), "-o", str(tmp_path / "out"), "--verbose"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            timeout=60,
        )
        refused = [
            subprocess.run(
                [*PROGRAM, "estimate", str(tmp_path / "none"), *flags],
                stderr=log,
                check=False,
                timeout=60,
            ).returncode
            for flags in ((), ("--json",))
        ]
    assert ran.returncode == 0 and "complete" in ran.stdout
    assert refused == [1, 1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_bug_of_ours(closed: str, tmp_path: Path) -> None:
    """The files that are written then have numbers of their own: nothing is printed into them."""
    out = tmp_path / "out"
    command = f"{sys.executable} -m qtool quantize {DEMO} -o {out} {closed}"
    ran = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0 and "bug" not in ran.stderr
    assert run("inspect", out, "--verify").exit_code == 0
    generate = f"{sys.executable} -m qtool generate {DEMO} Hi --max-new-tokens 2 {closed}"
    ran = subprocess.run(
        ["sh", "-c", generate], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0 and "bug" not in ran.stderr
