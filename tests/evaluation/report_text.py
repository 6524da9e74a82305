"""Pages as their readers see them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class _Text(HTMLParser):
    """Visible text and a check that every element is closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "title" not in self.open:
            self.pieces.append(data)


def visible_text(page: str) -> str:
    """What a reader sees of a page. Fails where an element is not closed where it was opened."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return re.sub(r"\s+", " ", " ".join(parser.pieces))
