"""Markup in which all that is not markup already is escaped, so that no name of a run can become a part of it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

Attribute = str | int | float | bool | None
"""Of an element; numbers are written short, None and False leave the attribute out."""

VOID = frozenset(
    {"br", "circle", "col", "hr", "image", "img", "input", "line", "link", "meta", "path", "rect", "use", "wbr"}
)
"""Elements without content. Those of SVG are written as empty ones, which HTML's parser takes."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that turn the direction of the text around them, and halves of characters."""


class Html(str):
    """Text that is markup; every other text is escaped where it enters an element."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]
"""What an element may hold: markup, text, numbers, and any nesting of them; None is nothing."""


def element(name: str, /, *content: Content, **attributes: Attribute) -> Html:
    """Return an element.

    Args:
        content: what it holds.
        attributes: by name; ``_`` stands for ``-``, at the end of a name for nothing, as in ``class_``.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{markup(*content)}</{name}>")


def markup(*content: Content) -> Html:
    """Return the markup of ``content``, one after the other."""
    return Html("".join(_pieces(content)))


def text(value: str) -> str:
    """Return a text escaped, with a mark in place of what would not show or would turn the text around it."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", value))


def number(value: float) -> str:
    """Return a coordinate for SVG: at most two decimals, no trailing zeros, no negative zero."""
    rounded = round(float(value), 2) + 0.0
    return f"{rounded:.2f}".rstrip("0").rstrip(".")


def _pieces(content: Content) -> Iterable[str]:
    match content:
        case None:
            return
        case Html():
            yield str(content)
        case str():
            yield text(content)
        case int() | float():
            yield number(content)
        case _:
            for each in content:
                yield from _pieces(each)


def _attribute(name: str, value: Attribute) -> str:
    key = name.rstrip("_").replace("_", "-")
    match value:
        case None | False:
            return ""
        case True:
            return f" {key}"
        case str():
            return f' {key}="{text(value)}"'
        case _:
            return f' {key}="{number(value)}"'
