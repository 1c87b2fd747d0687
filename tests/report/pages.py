"""Reading a page as a browser does, as far as the tests need it."""

import re
from html.parser import HTMLParser

LOADING = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}
VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


class Page(HTMLParser):
    """Tags, attributes, tables (as lists of rows of texts) and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self._open = [], {}, "", []
        self._label = None
        self.feed(text)
        assert self._open == [], "elements that are never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "div" and dict(attributes).get("role") == "region":
            self._label = dict(attributes)["aria-label"]
            self.tables.setdefault(self._label, [])
        if tag == "tr":
            self.tables[self._label].append([])
        if tag in ("td", "th"):
            self.tables[self._label][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._open):
            row = self.tables[self._label][-1]
            row[-1] = f"{row[-1]} {data.strip()}".strip()


def check_self_contained(text):
    """Asserts that nothing is loaded from elsewhere and no script runs."""
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in LOADING:
                assert value.startswith("data:image/png;base64,"), (tag, name, value)
    for style in re.findall(r"<style>(.*?)</style>", text, re.DOTALL):
        assert "url(" not in style
        assert "@import" not in style
    return page
