"""The pictures of `--plot`: what they say, that they are whole, and that a browser shows them."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest

from qtool.errors import QtoolError
from qtool.planner.curves import ContextCurves, MemoryLimit, context_curves
from qtool.planner.estimate import EstimateRequest, estimate_opened
from qtool.planner.gpus import resolve_gpus
from qtool.planner.reference_models import reference_models
from qtool.planner.sizing import SizingRequest, size_models
from qtool.report.plot import check_plot_path, write_plot, write_sizing_plot
from qtool.report.plot_frame import (
    COLOURS,
    DARK_COLOURS,
    context_ticks,
    context_words,
    sizing_bars,
    split_limits,
    spread,
    tokens_text,
)
from tests.report.browser import find_browser, open_page

NO_BROWSER = "no Chromium is installed (QTOOL_TEST_BROWSER names one)"
SUFFIXES = ("svg", "png", "html")


@pytest.fixture(scope="module")
def curves() -> ContextCurves:
    """Llama 3.1 8B at four precisions against GPUs close to each other and one far above."""
    model = next(model for model in reference_models() if model.size == "8B").describe()
    gpus = resolve_gpus(("RTX 3090", "RTX 4090", "L4", "H200"))
    return context_curves(model, estimate_opened(model, gpus, EstimateRequest("8B")))


@pytest.fixture(scope="module")
def sizing():
    return size_models(SizingRequest())


def svg_texts(path) -> list[str]:
    return [text.text or "" for text in ElementTree.parse(path).iter() if text.tag.endswith("text")]


def embedded(path) -> dict:
    text = path.read_text(encoding="utf-8")
    [plan] = re.findall(r'<script id="plan" type="application/json">(.*?)</script>', text)
    return json.loads(plan)


def named(curves: ContextCurves, name: str) -> ContextCurves:
    return replace(curves, model=curves.model._replace(id=name))


# -- what a picture says --------------------------------------------------------------------------


def test_svg_names_model_precisions_gpus_and_contexts(curves, tmp_path):
    write_plot(tmp_path / "memory.svg", curves)
    texts = svg_texts(tmp_path / "memory.svg")
    said = [*texts, *(word for text in texts for word in text.split())]
    assert {"8B", "bf16", "int8", "nf4", "nf4-dq", "4k", "32k", "128k", "GiB"} <= set(said)
    assert "RTX 3090  23.64 GiB" in texts and "RTX 4090  23.63 GiB" in texts
    assert "↑ H200 SXM  139.80 GiB" in texts  # too far above to be drawn
    assert "4,096 tokens" in texts


def test_labels_of_gpus_close_to_each_other_stand_apart(curves, tmp_path):
    write_plot(tmp_path / "memory.svg", curves)
    tree = ElementTree.parse(tmp_path / "memory.svg")
    heights = {}
    for text in tree.iter("{http://www.w3.org/2000/svg}text"):
        place = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
        x, y = map(float, place.groups()) if place else (float(text.get("x")), float(text.get("y")))
        if (text.text or "").endswith(" GiB") or text.text in ("bf16", "int8", "nf4"):
            heights[text.text] = (x, y)
    assert len({x for x, _ in heights.values()}) == 1 and len(heights) == 7
    ordered = sorted(y for _, y in heights.values())
    assert min(b - a for a, b in pairwise(ordered)) >= 12.9


def test_png_is_a_picture_of_a_readable_size(curves, tmp_path):
    write_plot(tmp_path / "memory.PNG", curves)
    data = (tmp_path / "memory.PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1200 and height > 800


def test_page_holds_every_number_and_asks_for_nothing(curves, tmp_path):
    write_plot(tmp_path / "memory.html", curves)
    plan = embedded(tmp_path / "memory.html")
    assert tuple(plan["contexts"]) == curves.contexts and plan["asked"] == 4096
    for fields, curve in zip(plan["precisions"], curves.precisions, strict=True):
        assert fields["quant"] == curve.quant
        assert fields["peakBytes"] == [point.peak_bytes for point in curve.points]
        assert fields["lowBytes"] == [point.low_bytes for point in curve.points]
        assert fields["highBytes"] == [point.high_bytes for point in curve.points]
        assert tuple(fields["longest"]) == curve.longest
    assert [limit["usableBytes"] for limit in plan["limits"]] == [
        limit.usable_bytes for limit in curves.limits
    ]
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    assert not re.search(r"""https?:|//\w+\.|\bsrc\s*=|\bhref\s*=|@import|url\(""", page)
    assert "default-src 'none'" in page


def test_sizing_pictures_name_every_model_and_where_it_fits(sizing, tmp_path):
    write_sizing_plot(tmp_path / "sizing.svg", sizing)
    texts = svg_texts(tmp_path / "sizing.svg")
    assert "8B (Llama 3.1 8B)" in texts and "24 GiB" in texts
    bars = sizing_bars(sizing)
    assert {bar.text for bar in bars} <= set(texts)
    write_sizing_plot(tmp_path / "sizing.html", sizing)
    plan = embedded(tmp_path / "sizing.html")
    assert [(bar["model"], bar["quant"], bar["peakBytes"]) for bar in plan["bars"]] == [
        (bar.model, bar.quant, bar.peak_bytes) for bar in bars
    ]
    answers = [answer for bar in plan["bars"] for answer in bar["answers"]]
    assert [answer["verdict"] for answer in answers] == [row.verdict for row in sizing.rows]


def test_a_bar_names_the_smallest_device_and_whether_it_is_tight(sizing):
    for bar in sizing_bars(sizing):
        holding = next(row for row in bar.rows if row.verdict != "no")
        how = {"yes": "fits", "tight": "tight on"}[holding.verdict]
        assert bar.text.endswith(f"{how} {holding.vram_gib:g} GiB")
    tiny_gpus = replace(sizing, rows=tuple(replace(r, verdict="no") for r in sizing.rows))
    assert all(bar.text.endswith("fits none of these") for bar in sizing_bars(tiny_gpus))


def test_words_tell_the_workload_and_which_memory_is_not_confirmed(curves):
    workload = replace(curves.workload, mode="qlora", gpus=2, batch=3, kv_dtype="fp8")
    unsure = (MemoryLimit("RTX 4060", 1 << 33, is_recalled=True),)
    words = context_words(replace(curves, workload=workload, limits=unsure))
    for part in ("QLoRA r 16", "fullest of 2 GPUs", "3 sequences", "fp8 cache", "checkpointing"):
        assert part in words.subtitle
    assert any("not confirmed" in line for line in words.footnotes)
    assert not any("prompt" in line for line in words.footnotes)
    assert not any("not confirmed" in line for line in context_words(curves).footnotes)


@pytest.mark.parametrize(
    "name", ["$x^2$ & </script><script>alert(1)//", "{{plan}}", "a" * 96, "千問"]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("error")
def test_no_name_breaks_a_picture(curves, tmp_path, name, suffix):
    path = tmp_path / f"memory.{suffix}"
    write_plot(path, named(curves, name))
    if suffix == "svg":
        assert name in svg_texts(path)
    if suffix == "html":
        assert embedded(path)["asked"] == 4096
        assert "<script>alert" not in path.read_text()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_name_breaks_a_picture_of_bars(sizing, tmp_path, suffix):
    name = "$x$</script><script>alert(1)//"
    hostile = replace(sizing, rows=tuple(replace(row, model=name) for row in sizing.rows))
    write_sizing_plot(tmp_path / f"sizing.{suffix}", hostile)
    if suffix == "svg":
        assert name in svg_texts(tmp_path / "sizing.svg")
    if suffix == "html":
        assert {bar["model"] for bar in embedded(tmp_path / "sizing.html")["bars"]} == {name}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_plan_gives_the_same_bytes_whatever_the_user_s_settings(curves, tmp_path, suffix):
    import matplotlib

    write_plot(tmp_path / f"a.{suffix}", curves)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        write_plot(tmp_path / f"b.{suffix}", curves)
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memory", "memory.pdf", "memory.svg.txt"])
def test_another_ending_is_refused_with_the_three_that_work(tmp_path, name):
    with pytest.raises(QtoolError, match=r"\.svg, \.png or \.html") as caught:
        check_plot_path(tmp_path / name)
    assert caught.value.kind == "usage"


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(QtoolError, match="there is no folder") as caught:
        check_plot_path(tmp_path / "nowhere" / "memory.svg")
    assert caught.value.kind == "usage"
    assert caught.value.hint == f"mkdir -p {tmp_path / 'nowhere'}"


def test_a_folder_of_that_name_is_refused(tmp_path):
    (tmp_path / "memory.svg").mkdir()
    with pytest.raises(QtoolError, match="folder of that name"):
        check_plot_path(tmp_path / "memory.svg")


def test_without_matplotlib_only_the_page_is_written(curves, sizing, tmp_path, monkeypatch):
    find_spec, load = importlib.util.find_spec, builtins.__import__

    def no_spec(name, *more):
        return None if name == "matplotlib" else find_spec(name, *more)

    def refuse(name, *more):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return load(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", no_spec)
    monkeypatch.setattr(builtins, "__import__", refuse)
    for suffix in ("svg", "png"):
        with pytest.raises(QtoolError, match="needs matplotlib") as caught:
            write_plot(tmp_path / f"memory.{suffix}", curves)
        assert "pip install 'qtool[plot]'" in caught.value.hint
    write_plot(tmp_path / "memory.html", curves)
    write_sizing_plot(tmp_path / "sizing.html", sizing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.html", "sizing.html"]


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(curves, tmp_path, monkeypatch):
    path = tmp_path / "memory.html"
    path.write_text("old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError):
        write_plot(path, curves)
    assert [file.name for file in tmp_path.iterdir()] == ["memory.html"]
    assert path.read_text() == "old"


def test_asking_whether_a_picture_can_be_written_loads_no_matplotlib():
    script = (
        "import sys; from pathlib import Path; from qtool.report.plot import check_plot_path\n"
        "check_plot_path(Path('memory.svg')); print('matplotlib' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


# -- axes and labels ------------------------------------------------------------------------------


def test_labels_keep_their_place_where_there_is_room_and_share_it_where_not():
    assert spread([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert spread([50, 52, 51], 10, 0, 100) == [41, 61, 51]
    assert spread([1, 2, 98], 10, 0, 100) == [0, 10, 98]
    assert spread([99, 99], 10, 0, 100) == [90, 100]
    assert spread([0] * 4, 10, 0, 20) == [0, 10, 20, 30]  # no room: from the lowest on
    assert spread([], 10, 0, 100) == []


def test_ticks_are_powers_of_two_and_few():
    assert context_ticks(256, 4096) == [256, 512, 1024, 2048, 4096]
    assert context_ticks(300, 5000) == [512, 1024, 2048, 4096]
    assert context_ticks(1, 1 << 20)[-1] == 1 << 20
    assert len(context_ticks(1, 1 << 24)) <= 10
    assert [tokens_text(n) for n in (512, 1024, 131_072, 1 << 20)] == ["512", "1k", "128k", "1M"]


def test_limits_far_above_everything_are_only_named():
    near, far = MemoryLimit("near", 150), MemoryLimit("far", 161)
    assert split_limits([far, near], 100) == ([near], [far])


@pytest.mark.parametrize(("colours", "paper"), [(COLOURS, "#ffffff"), (DARK_COLOURS, "#16181c")])
def test_colours_stand_out_from_their_paper(colours, paper):
    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in colours:
        light, dark = sorted([luminance(colour), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4, colour
    assert len(set(colours)) == len(COLOURS) == len(DARK_COLOURS)


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip(NO_BROWSER)
    return lambda path: open_page(browser, path, tmp_path / "profile")


CAPTION = "document.querySelector('caption').textContent"
ROWS = "[...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(c => c.innerText))"
BOXES = "[...document.querySelectorAll('#switches input')]"


def test_browser_draws_the_curves_and_reads_values_under_the_pointer(curves, tmp_path, opened):
    write_plot(tmp_path / "memory.html", curves)
    with opened(tmp_path / "memory.html") as page:
        assert page.evaluate("document.querySelectorAll('.curve').length") == 4
        assert page.evaluate("document.querySelectorAll('.limit').length") == 3
        assert page.evaluate(CAPTION) == "At 4,096 tokens"
        rows = page.evaluate(ROWS)
        assert [row[0] for row in rows] == ["bf16", "int8", "nf4", "nf4-dq"]
        asked = curves.contexts.index(4096)
        peak_gib = curves.precisions[0].points[asked].peak_bytes / 2**30
        assert rows[0][1] == f"{peak_gib:.2f}"
        assert rows[3][4] == f"✓ up to {curves.precisions[3].longest[1]:,}"  # H200 comes last

        page.move_pointer(60, 300)
        assert page.evaluate(CAPTION) == "At 256 tokens"
        page.evaluate("drawing.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
        assert page.evaluate(CAPTION) == f"At {curves.contexts[1]} tokens"
        page.evaluate(f"{BOXES}[0].click()")
        assert page.evaluate("document.querySelectorAll('.curve').length") == 3
        assert [row[0] for row in page.evaluate(ROWS)] == ["int8", "nf4", "nf4-dq"]
        page.evaluate(f"{BOXES}.slice(1).forEach(box => box.click())")
        assert page.evaluate("document.querySelectorAll('.curve').length") == 1  # the last stays
        assert page.complaints == []
        assert page.requests == [(tmp_path / "memory.html").as_uri()]


def test_browser_keeps_labels_apart_and_inside_the_page(curves, tmp_path, opened):
    write_plot(tmp_path / "memory.html", curves)
    with opened(tmp_path / "memory.html") as page:
        boxes = page.evaluate(
            "[...document.querySelectorAll('text.strong')].filter(t => t.textContent)"
            ".map(t => t.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
        )
        assert len(boxes) == 9  # four precisions, four GPUs, the cursor
        width = page.evaluate("document.documentElement.clientWidth")
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and right <= width
            for other in boxes[:number]:
                apart = bottom <= other[1] + 2 or top >= other[3] - 2
                assert apart or right <= other[0] or left >= other[2]


def test_browser_shows_the_bars_and_each_device_s_answer(sizing, tmp_path, opened):
    write_sizing_plot(tmp_path / "sizing.html", sizing)
    with opened(tmp_path / "sizing.html") as page:
        assert page.evaluate("document.querySelectorAll('.bar').length") == 14
        page.evaluate(
            "document.querySelectorAll('.bar')[5].dispatchEvent(new PointerEvent('pointerenter'))"
        )
        bar = sizing_bars(sizing)[5]
        assert page.evaluate(CAPTION).startswith(f"8B (Llama 3.1 8B) at {bar.quant}")
        words = [row[3].split()[1] for row in page.evaluate(ROWS)]
        assert words == [row.verdict for row in bar.rows]
        page.evaluate(f"{BOXES}[0].click()")
        assert page.evaluate("document.querySelectorAll('.bar').length") == 7
        assert page.complaints == [] and len(page.requests) == 1


def test_browser_runs_no_script_from_a_name(curves, tmp_path, opened):
    write_plot(tmp_path / "memory.html", named(curves, "<img src=x onerror=alert(1)></script>"))
    with opened(tmp_path / "memory.html") as page:
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.querySelector('h1').textContent").startswith("<img src=x")
        assert page.complaints == [] and len(page.requests) == 1
