"""The loss over steps as text and as a picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qtool.report.loss_curve import TEXT_COLUMNS, TEXT_ROWS, loss_svg, loss_text

SVG = "{http://www.w3.org/2000/svg}"


def test_text_falls_with_the_loss() -> None:
    lines = loss_text([4.0, 4.0, 3.0, 2.0, 1.0])
    assert len(lines) == TEXT_ROWS + 1
    assert lines[0] == "  4.0000 ┤██"
    assert lines[TEXT_ROWS - 1] == "  1.0000 ┤████▁"
    assert lines[-1] == "         └───── 5 steps"


def test_many_steps_are_means() -> None:
    lines = loss_text([float(step % 2) for step in range(10 * TEXT_COLUMNS)])
    assert lines[-1].count("─") == TEXT_COLUMNS
    assert "0.5000" in lines[0]
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("losses", [[], [2.0], [4.0, 3.0, 2.0, 1.0]])
def test_a_few_steps_make_no_curve(losses: list[float]) -> None:
    assert loss_text(losses) == []


def test_equal_losses_make_a_flat_one() -> None:
    assert loss_text([2.0] * 5)[TEXT_ROWS - 1] == "  2.0000 ┤▁▁▁▁▁"


def test_the_picture_holds_every_step_and_held_out_loss() -> None:
    points = [(step, 4 / step) for step in range(1, 301)]
    svg = ElementTree.fromstring(loss_svg(points, [(150, 1.0), (300, 0.5)], title="a <b> & c"))
    steps, means = (line.attrib["points"].split() for line in svg.iter(f"{SVG}polyline"))
    assert (len(steps), len(means)) == (300, 50)
    heights = [float(place.split(",")[1]) for place in steps]
    assert heights == sorted(heights)  # down the page as the loss falls
    assert len(list(svg.iter(f"{SVG}circle"))) == 2
    assert next(svg.iter(f"{SVG}text")).text == "a <b> & c"


def test_a_single_step_can_be_drawn() -> None:
    ElementTree.fromstring(loss_svg([(1, 2.0)], [], title="x"))
