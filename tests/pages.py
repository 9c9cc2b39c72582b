"""A report's page read back as its readers see it."""

import csv
import io
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from wd_probe.report.page import report


class Page(HTMLParser):
    """A page's text, figures, links and element names."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.figures, self.data, self.outside, self.text = [], [], {}, [], ""
        self.open = []
        self.source = Path(file).read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append(tag)
        if tag not in ("meta", "link", "path", "br"):
            self.open.append(tag)
        if tag == "svg":
            assert attributes["role"] == "img"
            self.figures.append(attributes["aria-label"].split(":")[0])
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name, "#")
            if not target.startswith(("data:", "#")):
                self.outside.append(target)
        if "download" in attributes:
            text = unquote(attributes["href"].partition(",")[2])
            self.data[attributes["download"]] = list(csv.DictReader(io.StringIO(text)))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(paths, tmp_path, **options):
    return Page(report(paths, tmp_path / "page.html", **options)["page"])
