"""What a browser would make of a page, read with the standard library and stricter than a browser.

The content model is that of the HTML standard for the elements that the report uses; any other element is an error.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

STYLE = (resources.files("fusecheck.report") / "templates" / "report.css").read_text(encoding="utf-8")
THEMES = dict(
    zip(
        ("light", "dark", "print"),
        (dict(re.findall(r"--([\w-]+): ([^;]+);", block)) for block in re.findall(r":root \{[^}]*\}", STYLE)),
        strict=True,
    )
)
"""The colours of each way to show the page, by name."""

VOID = {"meta", "br"}
DRAWN = {"line", "rect", "path", "circle", "polyline", "polygon"}
PHRASING = {"label", "select", "a", "b", "br", "button", "code", "i", "mark", "span", "strong", "svg", "text", "time"}
FLOW = PHRASING | {
    *("article", "details", "div", "dl", "figure", "footer", "header", "main", "nav", "p", "pre", "section", "table"),
    *("h1", "h2", "h3", "h4", "h5", "ul"),
}
CHILDREN: dict[str, set[str]] = {
    "": {"html"},
    "html": {"head", "body"},
    "head": {"meta", "title", "style"},
    "body": FLOW | {"script"},
    **dict.fromkeys(("article", "div", "footer", "header", "main", "nav", "section", "td", "th", "dd", "li"), FLOW),
    **dict.fromkeys(("p", "h1", "h2", "h3", "h4", "h5", "pre", "span", "strong", "b", "code", "mark", "dt"), PHRASING),
    **dict.fromkeys(("summary", "figcaption", "time", "i"), PHRASING),
    **dict.fromkeys(("a", "button"), PHRASING - {"a", "button"}),
    "details": FLOW | {"summary"},
    "figure": FLOW | {"figcaption"},
    "label": PHRASING,
    "select": {"option"},
    "ul": {"li"},
    "dl": {"dt", "dd"},
    "table": {"thead", "tbody"},
    "thead": {"tr"},
    "tbody": {"tr"},
    "tr": {"th", "td"},
    "svg": DRAWN | {"svg", "text"},
    **{tag: set() for tag in ("title", "style", "script", "text", "option")},
}
CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Page(HTMLParser):
    """Tags, attributes and text of a page; every element lies where it may and is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        assert text.lstrip().startswith("<!DOCTYPE html>")
        assert CONTROLS.search(text) is None
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pictures: list[dict[str, str]] = []
        self.headings: list[int] = []
        self.text = ""
        self._open = [""]
        self._rows: list[list[int]] = []
        self._below: dict[int, int] = {}
        self.feed(text)
        self.close()
        assert self._open == [""]

    def values(self, *names: str) -> list[str]:
        """The values of all attributes of these names."""
        return [value for _, name, value in self.attributes if name in names]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN, f"<{tag}/> closes nothing in HTML"
        self._take(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1] == tag, f"</{tag}> while <{self._open[-1]}> is open"
        self._open.pop()
        if tag == "table":
            rows = self._rows
            assert len({len(row) for row in rows}) <= 1, f"rows of {[len(row) for row in rows]} columns"

    def handle_data(self, data: str) -> None:
        assert not data.strip() or self._open[-1] not in {"", "html", "head", "ul", "dl", "table", "tbody", "tr"}
        self.text += data

    def _take(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in CHILDREN[self._open[-1]], f"<{tag}> may not lie in <{self._open[-1]}>"
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is there twice"
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if tag == "svg" and self._open[-1] != "svg":
            self.pictures.append(given)
        elif tag in {"h1", "h2", "h3", "h4", "h5"}:
            self.headings.append(int(tag[1]))
        elif tag == "table":
            self._rows, self._below = [], {}
        elif tag == "tr":
            self._rows.append([])
            self._stand()
        elif tag in {"td", "th"}:
            self._cell(int(given.get("colspan", 1)), int(given.get("rowspan", 1)))

    def _cell(self, wide: int, high: int) -> None:
        """Put a cell at the first free place of the row, and what it covers below."""
        row = self._rows[-1]
        for _ in range(wide):
            self._below[len(row)] = high - 1
            row.append(1)
        self._stand()

    def _stand(self) -> None:
        """Step over the places that a cell of a row above covers."""
        row = self._rows[-1]
        while self._below.get(len(row), 0) > 0:
            self._below[len(row)] -= 1
            row.append(1)
