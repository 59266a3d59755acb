"""A parser of pages for the tests of the report."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_VOID_TAGS = ("meta", "img", "br", "link", "input")


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        open: tags that were opened and not closed.
        tags: all tags.
        addresses: all addresses that something could be loaded from.
        text: the text outside of scripts and styles.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "action"):
                self.addresses.append(value or "")
        if tag not in _VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data
