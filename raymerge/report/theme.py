"""The colours of a report, named once, for a light and a dark page.

Figures are drawn in the light colours. On the page each becomes a CSS variable of the same name,
which the style sheet sets for both schemes (paper is light).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

_HUES = (212, 24, 140, 348, 268, 44, 178, 312, 96, 232)
SERIES_COLOURS = len(_HUES)


def _hsl(hue: int, saturation: float, lightness: float) -> str:
    channels = colorsys.hls_to_rgb(hue / 360, lightness, saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5b6570",
    "rule": "#d9dee3",
    "grid": "#e8ebee",
    "accent": "#1f5fa8",
    "quiet": "#9fb4cc",
    "reference": "#c3c9d0",
    "tint": "#f4f6f8",
    **{f"series-{i}": _hsl(hue, 0.68, 0.40) for i, hue in enumerate(_HUES)},
}
DARK: Mapping[str, str] = {
    "paper": "#14171a",
    "ink": "#e4e7ea",
    "muted": "#9aa4ae",
    "rule": "#343a41",
    "grid": "#262b30",
    "accent": "#6fa8e6",
    "quiet": "#46617f",
    "reference": "#4b525a",
    "tint": "#1c2024",
    **{f"series-{i}": _hsl(hue, 0.62, 0.66) for i, hue in enumerate(_HUES)},
}
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
"""Light colour → the CSS variable that stands for it on the page."""
