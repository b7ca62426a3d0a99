"""A report page read back as tags, texts and table cells."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = '<script>alert("x")</script>&\'"'


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
        if tag != "meta":
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
