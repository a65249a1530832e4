"""Markup: what is text stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from bevkd.viz.html.element import Html, element, markup, number


class Parsed(HTMLParser):
    """What a parser of HTML sees: elements, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(), st.text())
def test_no_text_becomes_markup(text: str, attribute: str) -> None:
    parsed = Parsed(element("p", text, title=attribute))
    assert parsed.names == ["p"]
    assert set(parsed.attributes) == {"title"}
    printable = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text)
    assert parsed.text == printable


def test_markup_within_markup_is_not_escaped_again() -> None:
    assert element("p", element("b", "a & b"), " < c") == "<p><b>a &amp; b</b> &lt; c</p>"


def test_content_may_be_nested_and_absent() -> None:
    assert markup("a", None, ["b", ["c", Html("<br/>")], 2.50]) == "abc<br/>2.5"


def test_attributes_are_named_as_python_allows() -> None:
    written = element("input", class_="x", data_layer="y", checked=True, disabled=False, title=None, tabindex=0)
    assert written == '<input class="x" data-layer="y" checked tabindex="0"/>'


def test_numbers_are_short_and_never_minus_zero() -> None:
    assert [number(value) for value in (1.0, 0.125, -0.001, 1e-9, 12.3456)] == ["1", "0.12", "0", "0", "12.35"]


def test_marks_that_turn_the_text_around_them_are_replaced() -> None:
    assert markup("a\u202eb\x00c") == "a\ufffdb\ufffdc"
