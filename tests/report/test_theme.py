"""Facts about the colours: a figure's light colour must stand for one variable of the page."""

from __future__ import annotations

import re

from raymerge.report.theme import DARK, LIGHT, SERIES_COLOURS, VARIABLES


def test_light_and_dark_name_the_same_colours():
    assert list(LIGHT) == list(DARK)
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in [*LIGHT.values(), *DARK.values()])


def test_every_light_colour_stands_for_one_variable():
    assert {colour: f"var(--{name})" for name, colour in LIGHT.items()} == VARIABLES
    assert len(VARIABLES) == len(LIGHT)


def test_lines_are_told_apart_in_both_schemes():
    for scheme in (LIGHT, DARK):
        assert len({scheme[f"series-{i}"] for i in range(SERIES_COLOURS)}) == SERIES_COLOURS
