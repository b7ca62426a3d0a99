"""HTML and SVG elements as functions; text is escaped unless it is ``Markup`` already."""

from __future__ import annotations

from html import escape


class Markup(str):
    """HTML source. Only ``tag`` and ``join`` make it from text, and they escape."""

    __slots__ = ()


_EMPTY_HTML = frozenset({"meta", "br"})
_EMPTY_SVG = frozenset({"rect", "line", "path", "circle"})


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """``tag("td", "a<b", class_="num")`` → ``<td class="num">a&lt;b</td>``.

    Attribute names lose a trailing underscore and turn inner ones to hyphens; None leaves the
    attribute or the child out.
    """
    opening = name + "".join(
        f' {_attribute(key)}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(*children)
    if name in _EMPTY_HTML:
        return Markup(f"<{opening}>")
    if name in _EMPTY_SVG and not inner:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{inner}</{name}>")


def join(*children: str | None) -> Markup:
    """The children one after the other."""
    present = (child for child in children if child is not None)
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in present))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else compact(value)


def compact(value: float) -> str:
    """At most two decimals, no trailing zeros: SVG coordinates stay short."""
    text = f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))
    return "0" if text == "-0" else text
