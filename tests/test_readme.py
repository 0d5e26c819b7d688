"""The README's commands run, and print what it shows.

Digits are not compared: times and speeds differ, and sizes have tests of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Work that takes long enough to be told about depends on the machine, and so does the backend.
PROGRESS = re.compile(
    r"^(kernels made ready|backend  |\w+: .* in [\d.]+ s( \(.* GB/s\))?$).*$", re.MULTILINE
)


def console_blocks() -> list[tuple[str, str]]:
    """(command, output shown) of every ```console block; each holds one command."""
    blocks = re.findall(r"^```console\n\$ (.+?)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [(command, shown) for command, shown in blocks]


def shape_of(text: str) -> list[str]:
    """The text's lines with numbers, rates and runs of spaces made alike, without progress."""
    text = re.sub(r"\d[\d,.]*", "#", PROGRESS.sub("", text))
    lines = re.sub(r"# [kMG]B/s", "# B/s", text).splitlines()
    return [re.sub(r"[\s─━]+", " ", line).strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that looks like a clone to the commands."""
    folder = tmp_path_factory.mktemp("clone")
    for example in ("qtool/demo_model", "docs/examples"):
        shutil.copytree(ROOT / example, folder / example)
    return folder


def test_the_readme_shows_the_five_verbs():
    verbs = {shlex.split(command)[1] for command, _ in console_blocks()}
    assert verbs >= {"estimate", "sizing", "quantize", "inspect", "generate"}


@pytest.mark.slow
def test_console_blocks_show_what_the_commands_print(place):
    for command, shown in console_blocks():
        program, *words = shlex.split(command)
        assert program == "qtool"
        done = subprocess.run(
            [sys.executable, "-m", "qtool", *words],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        if words[0] != "generate":  # sampled text may differ between CPUs in the last bits
            assert shape_of(done.stdout) == shape_of(shown), command


@pytest.mark.slow
def test_the_python_example_runs(place):
    [example] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
        if "import qtool" in block
    ]
    [folder] = re.findall(r'qtool\.load\("(.+?)"\)', example)
    settings = {"cwd": place, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 300}
    if not (place / folder).exists():
        quantize = [sys.executable, "-m", "qtool", "quantize", "qtool/demo_model", "-o", folder]
        subprocess.run(quantize, check=True, **settings)
    # -P: the clone's own folder `qtool` holds no code
    command = [sys.executable, "-P", "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_verb_of_the_readme_exists():
    from qtool.cli.app import VERBS

    assert set(re.findall(r"`qtool (\w+)[` ]", README)) <= set(VERBS)


def test_the_two_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_point_at_files_that_exist(link):
    assert (ROOT / link).exists()


def computed_cell(rows: list[dict]) -> str:
    """The largest model that fits and its context; the next one too where it is tight."""
    fitting = [row for row in rows if row["verdict"] != "no"]
    whole = [row for row in fitting if row["verdict"] == "yes"][-1]
    cell = f"{whole['model']}, to {whole['max_context'] // 1024}k"
    if fitting[-1] is not whole:
        last = fitting[-1]
        cell += f" ({last['model']} to {last['max_context'] // 1024}k, tight)"
    return cell


def test_the_guide_beside_the_rule_of_thumb_is_computed():
    from qtool.planner.sizing import SizingRequest, size_models
    from qtool.report.sizing import sizing_document

    rows = sizing_document(size_models(SizingRequest()))["rows"]
    table = re.findall(r"^\| (\d+) GiB \| (.+) \|$", README, re.MULTILINE)
    assert [int(gib) for gib, _ in table] == [8, 12, 16, 24, 40, 80]
    for gib, cells in table:
        _, four_bit, _, eight_bit = cells.replace("*", "").replace(" tokens", "").split(" | ")
        for quant, shown in (("nf4-dq", four_bit), ("int8", eight_bit)):
            found = [r for r in rows if r["vram_gib"] == int(gib) and r["quant"] == quant]
            assert shown == computed_cell(found), (gib, quant)
