"""Charts inside the page: they follow its colours, explain themselves, and request nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from raymerge.report.curves import Series
from raymerge.report.figures import Bar, Chart, bar_chart, heat_map, line_chart
from raymerge.report.inline_svg import inline_svg
from raymerge.report.records import Lambdas

LAMBDAS = Lambdas(tasks=("a", "b"), layers=("x.0", "x.1"), values=((0.1, 0.2), (0.3, 0.4)))


def chart_of(kind: str) -> Chart:
    if kind == "bars":
        return bar_chart([Bar("a", 0.5, "50.0 %", "accent"), Bar("b", 0.4, "x")], label="L", most=1)
    if kind == "heat map":
        return heat_map(LAMBDAS, label="L")
    series = [
        Series("a", (1, 2, 3, 4), (0.1, None, 0.3, 0.2)),
        Series("level", (1, 4), (0.2, 0.2), is_level=True),
        Series("mean", (1, 4), (0.2, 0.3), is_strong=True),
    ]
    chart = line_chart(series, label="L", x_label="step", y_label="λ")
    assert chart is not None
    return chart


KINDS = ("lines", "bars", "heat map")


@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_alone_and_names_no_other_element(kind):
    svg = ElementTree.fromstring(inline_svg(chart_of(kind)))
    assert (svg.tag, svg.get("role"), svg.get("aria-label")) == ("svg", "img", "L")
    allowed = {"svg", "g", "title", "path", "text", "circle"}
    assert {element.tag for element in svg.iter()} <= allowed
    names = {name for element in svg.iter() for name in element.attrib}
    assert not names & {"id", "clip-path", "href", "width", "height"}
    assert "url(" not in inline_svg(chart_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_its_colours_are_the_page_s_and_its_fonts_too(kind):
    svg = inline_svg(chart_of(kind))
    assert "var(--" in svg
    assert "font-family" not in svg
    assert "font-size" not in svg
    literal = set(re.findall("#[0-9a-f]{6}", svg))
    assert bool(literal) == (kind == "heat map")  # its cells keep their colours in the dark
    assert "#ffffff" not in literal


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_again_gives_the_same_text(kind):
    assert inline_svg(chart_of(kind)) == inline_svg(chart_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_are_short(kind):
    coordinates = re.findall(r' (?:d|x|y|cx|cy)="[^"]*"', inline_svg(chart_of(kind)))
    assert coordinates
    assert not re.search(r"\d\.\d{3,}", "".join(coordinates))


def test_a_line_its_points_and_its_name_share_a_group_with_a_tooltip():
    svg = ElementTree.fromstring(inline_svg(chart_of("lines")))
    groups = [g for g in svg.iter("g") if g.get("class") == "line"]
    assert [g.findtext("title") for g in groups] == [
        "a: 0.1 → 0.2",
        "level: 0.2",
        "mean: 0.2 → 0.3",
    ]
    assert [g.findtext("text") for g in groups] == ["a", "level", "mean"]
    assert [len(g.findall("circle")) for g in groups] == [3, 0, 2]


def test_a_gap_interrupts_the_line():
    svg = ElementTree.fromstring(inline_svg(chart_of("lines")))
    path = svg.find("g/path")
    assert path is not None
    assert [path.attrib["d"].count(letter) for letter in "ML"] == [2, 1]


def test_every_cell_has_a_tooltip_and_a_bar_s_words_share_its_own():
    cells = ElementTree.fromstring(inline_svg(chart_of("heat map"))).findall("g/path/title")
    assert [each.text for each in cells] == [
        *("a · x.0: 0.1000", "a · x.1: 0.2000", "b · x.0: 0.3000", "b · x.1: 0.4000")
    ]
    bars = ElementTree.fromstring(inline_svg(chart_of("bars"))).findall("g[@class='bar']")
    assert [bar.findtext("title") for bar in bars] == ["a: 50.0 %", "b: x"]
    assert [text.text for text in bars[0].findall("text")] == ["a", "50.0 %"]
