"""A chart as inline SVG: matplotlib's, rebuilt so that it belongs to the page.

What is kept: shapes and texts, short coordinates, one group for all parts of the same gid. What
changes: colours become CSS variables and so follow light, dark and print; fonts are the page's;
groups get their tooltips. What goes: ids, clip paths, metadata, and references to other elements,
so nothing can clash between two charts and nothing is requested.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

from raymerge.report.figures import Chart, style
from raymerge.report.theme import VARIABLES

_NOT_DRAWN = ("defs", "metadata")
_KEPT = ("d", "x", "y", "style", "transform")


def inline_svg(chart: Chart) -> Markup:
    """Return the chart as an ``svg`` element that screen readers announce by its label."""
    file = io.BytesIO()
    with style():
        chart.figure.savefig(file, format="svg")
    drawing = ElementTree.fromstring(file.getvalue())
    view = _rounded(drawing.attrib["viewBox"])
    svg = Element("svg", {"viewBox": view, "role": "img", "aria-label": chart.label})
    titles = {gid: iter(texts) for gid, texts in chart.tooltips.items() if len(texts) > 1}
    groups: dict[str, Element] = {}
    for gid, shape in _shapes(drawing, chart):
        # Parts of one gid share a group: a hover over a line's name also marks the line.
        if gid and gid not in groups:
            groups[gid] = SubElement(svg, "g", {"class": gid.partition("-")[0]})
            if gid not in titles:
                SubElement(groups[gid], "title").text = chart.tooltips[gid][0]
        if gid in titles:
            SubElement(shape, "title").text = next(titles[gid])
        groups.get(gid, svg).append(shape)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _shapes(node: Element, chart: Chart, gid: str = "") -> Iterator[tuple[str, Element]]:
    """Yield every shape and text in drawing order, with its gid if that has tooltips."""
    for child in node:
        name = child.tag.rpartition("}")[2]
        if name == "g":
            inner = child.get("id", "")
            yield from _shapes(child, chart, inner if inner in chart.tooltips else gid)
        elif name == "use":  # only the points of a line are drawn as references
            centre = {f"c{axis}": _rounded(child.attrib[axis]) for axis in "xy"}
            yield gid, Element("circle", {**centre, "r": "3", "style": _on_page(child)})
        elif name not in _NOT_DRAWN:
            yield gid, _simplified(name, child)


def _simplified(name: str, source: Element) -> Element:
    shape = Element(name, {key: source.attrib[key] for key in _KEPT if key in source.attrib})
    shape.text = source.text if name == "text" else None
    for key in ("d", "x", "y"):
        if key in shape.attrib:
            shape.set(key, _rounded(shape.attrib[key]))
    if shape.get("transform", "").startswith("rotate(-0 "):
        del shape.attrib["transform"]
    shape.set("style", _on_page(source))
    return shape


def _on_page(source: Element) -> str:
    """Return the style with the page's colours and fonts."""
    text = re.sub(r"font-(family|size): [^;]*;? ?", "", source.get("style", ""))
    return re.sub(r"#[0-9a-f]{6}", lambda match: VARIABLES.get(match[0], match[0]), text)


def _rounded(coordinates: str) -> str:
    """Return path data and coordinates with at most two decimals."""
    short = re.sub(
        r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), coordinates
    )
    return " ".join(short.split())
