"""The document around a report's sections: head with style and script in it, navigation, sections, footer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from bevkd.viz.html.element import Content, Html, element, markup

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""A browser that honours it fetches nothing, whatever the page says."""


@dataclass(frozen=True)
class Section:
    """A part of the page that the navigation leads to.

    Attributes:
        key: its address in the page.
        short: its name in the navigation.
        title: its heading; None for a section that brings its own.
        lead: what a reader must know before looking at it.
    """

    key: str
    short: str
    title: str | None
    lead: Content
    content: Content


def document(title: str, sections: Sequence[Section], foot: Content) -> str:
    """Return a whole HTML page that needs no other file."""
    links = [element("a", section.short, href=f"#{section.key}") for section in sections]
    button = element("button", "Dark", id="theme", type="button", hidden=True)
    bar = element(
        "div",
        element("span", "bevkd report", class_="brand"),
        element("nav", links, aria_label="Sections"),
        button,
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", _file("page.css")),
    )
    body = element(
        "body",
        element("a", "Skip to the finding", href="#finding", class_="skip"),
        element("header", bar, class_="bar"),
        element("main", [_section(section) for section in sections]),
        element("footer", foot, class_="foot"),
        element("script", _file("page.js")),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def block(title: str, *content: Content) -> Html:
    """Return a part of a section under a heading of its own."""
    return element("div", element("h3", title), content, class_="block")


def note(*paragraphs: Content, warning: bool = False) -> Html:
    """Return a remark: what is missing and how to get it, or what a reader must be warned of."""
    return element(
        "div", [element("p", each) for each in paragraphs], class_="note-box warn" if warning else "note-box"
    )


def tile(name: str, value: Content, remark: Content = None) -> Html:
    """Return a key figure with its name above and a remark below."""
    below = element("dd", remark, class_="note") if remark else None
    return element("div", element("dt", name), element("dd", value, class_="value"), below, class_="tile")


def tiles(*figures: Html) -> Html:
    """Return key figures side by side."""
    return element("dl", figures, class_="tiles")


def folded(summary: str, *content: Content) -> Html:
    """Return content that is shown on a click."""
    return element("details", element("summary", summary), content)


def small(*content: Content) -> Html:
    """Return a remark in small print."""
    return element("p", content, class_="small muted")


def _section(section: Section) -> Html:
    heading = element("h2", section.title) if section.title else None
    lead = element("p", section.lead, class_="lead") if section.lead else None
    return element("section", heading, lead, section.content, id=section.key)


def _file(name: str) -> Html:
    """Return a file of this package; it is ours, so it needs no escaping."""
    return markup(Html((resources.files("bevkd.viz.html") / name).read_text(encoding="utf-8")))
