"""Report pages, read as a browser would: tags that nest, texts, cells and tooltips."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from raymerge.report import write_report

EVIL = '<script>alert("x")</script>&\'"'
_VOID = ("meta", "br")


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append((dict(attrs).get("class") or "", ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.cells and self.open and self.open[-1] in ("td", "th"):
            class_, text = self.cells.pop()
            self.cells.append((class_, text + data))

    @property
    def cell_texts(self) -> list[str]:
        return [text for _, text in self.cells]

    @property
    def classes(self) -> list[str]:
        return [attributes.get("class") or "" for _, attributes in self.tags]

    def require_no_requests(self) -> None:
        """Assert that no tag and no attribute can load anything."""
        for name, attributes in self.tags:
            assert name not in {"script", "link", "img", "iframe", "object", "embed", "image"}
            assert name != "use"
            assert not {"src", "href", "xlink:href", "data", "onload"} & attributes.keys()


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))
