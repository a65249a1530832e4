"""Writes the reference tables of commands and config keys from the code, in place of markers in the pages.

``<!-- commands -->`` becomes the command line, ``<!-- config module.Class -->`` the keys of a pydantic model.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bevkd.config import PluginConfig

_ENTRY = re.compile(r"^( *)([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its markers replaced (called by mkdocs)."""
    markdown = markdown.replace("<!-- commands -->", _commands()) if "<!-- commands -->" in markdown else markdown
    return re.sub(r"<!-- config (\S+)\.(\w+) -->", lambda found: _config(found[1], found[2]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Return a page without the Sphinx roles of docstrings, which editors understand and mkdocs does not."""
    return re.sub(r":(?:meth|class|func|mod):(?=<code>)", "", html)


def _config(module: str, name: str) -> str:
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    meanings = {
        key: text
        for base in reversed(model.__mro__)
        for key, text in _meanings(inspect.cleandoc(base.__doc__ or "")).items()
    }
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
        shown = "required" if default is PydanticUndefined else _code(_plain(default))
        meaning = re.sub(r"\bNone\b", "`null`", field.description or meanings.get(key, ""))
        rows.append(_row(f"`{key}`", _code(_type(field.annotation)), shown, meaning))
    return "\n".join(rows)


def _meanings(docstring: str) -> dict[str, str]:
    """Return the text of each entry under ``Attributes:``."""
    _, _, section = docstring.partition("Attributes:\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    indent: int | None = None
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry and (indent is None or len(entry[1]) == indent):
            indent, names = len(entry[1]), entry[2].split(", ")
            meanings |= dict.fromkeys(names, entry[3])
        elif line.strip() and names:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments)
    if origin is typing.Literal:
        return " or ".join(json.dumps(each) for each in arguments) if len(arguments) < 6 else "str"
    if origin is tuple:
        return f"[{', '.join('...' if each is ... else _type(each) for each in arguments)}]"
    if origin is dict:
        return f"{{{_type(arguments[0])}: {_type(arguments[1])}}}"
    if annotation is type(None):
        return "null"
    if inspect.isclass(annotation) and issubclass(annotation, PluginConfig):
        return "plug-in"
    return "path" if annotation is Path else str(getattr(annotation, "__name__", annotation))


def _plain(value: Any) -> str:
    """Return a default as YAML takes it; a nested model is its class, with what differs from the class's defaults."""
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"{type(value).__name__} {json.dumps(changed)}" if changed else type(value).__name__
    return json.dumps(value, default=str)


def _commands() -> str:
    from cli import app

    group = typer.main.get_command(app)
    return "\n".join(_command(path, command) for path, command in _leaves(group, "bevkd"))


def _leaves(command: Any, path: str) -> list[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [leaf for name, child in command.commands.items() for leaf in _leaves(child, f"{path} {name}")]


def _command(path: str, command: Any) -> str:
    """Return a section about one command, from what typer and click both say about its parameters."""
    usage = " ".join([path, *(_value(each) for each in command.params if not _is_option(each)), "[OPTIONS]"])
    lines = [f"## {path.removeprefix('bevkd ')}", "", command.help, "", "```", usage, "```", ""]
    lines += ["| | default | |", "| --- | --- | --- |"]
    for each in command.params:
        option, flag = _is_option(each), getattr(each, "is_flag", False)
        name = _value(each) if not option else each.opts[0] if flag else f"{each.opts[0]} {_value(each)}"
        default = "required" if each.required else "" if flag else _code(_shown(each.default))
        lines.append(_row(_code(name), default, each.help or ""))
    return "\n".join([*lines, ""])


def _is_option(parameter: Any) -> bool:
    return str(parameter.opts[0]).startswith("-")


def _value(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _shown(default: Any) -> str:
    return "" if default is None else str(default)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("``", "`").replace("|", "\\|") for cell in cells) + " |"
