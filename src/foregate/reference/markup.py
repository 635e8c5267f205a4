"""Light removal of documentation markup: what is left reads as plain technical English with its code examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

LISTS = frozenset({"ul", "ol", "dl", "li", "dt", "dd"})
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "caption"})
BLOCKS = LISTS | HEADINGS | {"p", "div", "tr", "pre", "table", "br", "hr", "blockquote", "section", "figure"}
SKIPPED = frozenset({"script", "style", "head", "nav", "footer", "header", "form", "button", "select", "svg"})
SKIPPED_CLASSES = re.compile(
    r"\b(navheader|navfooter|sphinxsidebar|related|headerlink|toc|footer|nav|toctree-wrapper|searchbox|nosearch)\b"
)
VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "area", "base", "col", "embed", "source", "track", "wbr"})


class _TextOfHtml(HTMLParser):
    """Collects the text outside skipped elements; white space is kept only inside <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.open: list[tuple[str, bool]] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")
        if tag == "li":
            self.parts.append("- ")
        if tag in VOID:
            return
        values = dict(attrs)
        skip = tag in SKIPPED or SKIPPED_CLASSES.search(values.get("class") or "") is not None
        skip = skip or values.get("id") in ("hd", "ft", "sidebar")
        self.open.append((tag, skip))
        self.skipping += skip
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre") or tag[0] == "h" else "\n")
        if not any(name == tag for name, _ in self.open):
            return
        while True:  # pages leave <p> and <li> open: close everything inside as well
            name, skip = self.open.pop()
            self.skipping -= skip
            self.preformatted -= name == "pre"
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def from_html(text: str) -> str:
    """Visible text of a page without navigation."""
    parser = _TextOfHtml()
    parser.feed(text)
    parser.close()
    return re.sub(r"\n[ \t]+\n", "\n\n", "".join(parser.parts)).replace("¶", "")


def from_rst(text: str) -> str:
    """reStructuredText without roles, labels and index directives."""
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(
        r"^\.\. (?:_[^\n]*|index::[^\n]*|highlight::[^\n]*|module(?:author)?::[^\n]*)\n", "", text, flags=re.M
    )
    text = re.sub(r"^\.\. (?:[\w:]+::)[ ]?([^\n]+)$", r"\1", text, flags=re.M)
    return re.sub(r"`([^`<]+?)(?:\s*<[^`>]*>)?`_{1,2}", r"\1", text)


def from_pod(text: str) -> str:
    """Perl's plain old documentation without commands and formatting codes."""
    text = re.sub(r"^=(?:pod|cut|over|back|begin|end|for|encoding)[^\n]*\n", "", text, flags=re.M)
    text = re.sub(r"^=(?:head\d|item)[ \t]*", "", text, flags=re.M)
    text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    for _ in range(3):  # codes nest
        text = re.sub(r"\b[BCFIS]<(?:< )?([^<>]*?)(?: >)?>", r"\1", text)
    return text.replace("E<lt>", "<").replace("E<gt>", ">")


def tidy(text: str) -> str:
    """No trailing blanks, no run of more than one empty line."""
    lines = re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n").replace("\xa0", " "), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


MARKUPS: dict[str, Callable[[str], str]] = {"html": from_html, "rst": from_rst, "pod": from_pod, "text": str}
