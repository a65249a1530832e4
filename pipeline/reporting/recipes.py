"""What was run: where the recipes differ, the caches, the commands to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from bevkd.cache.manifest import package_versions
from bevkd.console import size_text
from bevkd.distill.base import loss_labels
from bevkd.errors import BevkdError
from bevkd.viz.html.element import Content, Html, element
from bevkd.viz.html.page import Section, block, folded, note, small
from bevkd.viz.html.tables import DASH, Cell, result_table
from pipeline.caches import info
from pipeline.recipe import StudentRecipe
from pipeline.reporting.methods import Scene, Shown
from pipeline.runs import Run, UsedCache

_LONGEST, _ROWS, _DIGITS = 120, 16, 12
"""Most letters of a value, rows that are shown at once, and digits of a digest."""


def recipes_section(scene: Scene, command: Sequence[str]) -> Section:
    """Return how the methods differ, what they read, and how to run them again.

    Args:
        command: that wrote the page.
    """
    content = [_differences(scene), _caches(scene), _commands(scene, command), _versions()]
    return Section("recipes", "Runs", "What was run", None, content)


def _differences(scene: Scene) -> Html:
    title = "Where the recipes differ"
    methods = scene.students
    settings = [_settings(shown) for shown in methods]
    keys = sorted(
        dict.fromkeys(key for each in settings for key in each),
        key=lambda key: (not key.startswith("distill:"), not key.startswith("distill")),
    )
    rows = [
        (_key(key), [_text(value) for value in values])
        for key in keys
        if len(set(values := [each.get(key, DASH) for each in settings])) > 1
    ]
    if not rows:
        single = "There is one method." if len(methods) == 1 else "The recipes of the students are the same."
        return block(title, note(single))
    heads: list[Content] = ["key", *(_name(shown) for shown in methods)]
    caption = "Keys that are not the same in all students; seeds and places aside, losses without their defaults."
    few, others = (result_table(caption, heads, part, "text keys") for part in (rows[:_ROWS], rows[_ROWS:]))
    return block(title, few, folded(f"{len(rows) - _ROWS} more", others) if len(rows) > _ROWS else None)


def _settings(shown: Shown) -> dict[str, str]:
    """Return what to compare of a recipe: what distils in a line per loss, and everything else key by key."""
    run = shown.runs[0]
    distill = run.recipe.distill if isinstance(run.recipe, StudentRecipe) else None
    told: dict[str, str] = {}
    for label, loss in zip(loss_labels(distill.losses), distill.losses, strict=True) if distill else ():
        own = loss.model_dump(mode="json", exclude_defaults=True)
        weights = {name: value for name in loss.weights if (value := getattr(loss, name))}
        kept = {**weights, **{key: value for key, value in own.items() if key not in ("name", *loss.weights)}}
        told[f"distill: {label}"] = ", ".join(f"{key} {_brief(value)}" for key, value in kept.items()) or "defaults"
    if distill:
        told["distill.frames"] = distill.frames
        told |= {f"distill.caches.{cache.name}": (cache.digest or cache.uri)[:_DIGITS] for cache in run.caches}
    others = {key: _brief(value) for key, value in run.settings.items() if not key.startswith("distill")}
    return {**told, **others}


def _key(path: str) -> Html:
    """Return a path that may break after its dots."""
    first, *others = path.split(".")
    return element("code", first, [[".", element("wbr"), part] for part in others])


def _name(shown: Shown) -> Html:
    return element("span", element("span", class_="swatch"), shown.name, class_=shown.tone)


def _brief(value: Any) -> str:
    """Return a value as YAML has it, not too long."""
    written = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return written if len(written) <= _LONGEST else f"{written[: _LONGEST - 1]}…"


def _caches(scene: Scene) -> Html:
    title = "Caches"
    found: dict[tuple[str, str | None, tuple[str, ...]], tuple[UsedCache, list[str]]] = {}
    for shown in scene.methods:
        for run in shown.runs:
            for cache in run.caches:
                _, readers = found.setdefault((cache.uri, cache.digest, cache.signals), (cache, []))
                readers += [] if shown.name in readers else [shown.name]
    if not found:
        return block(title, note("None of the runs read a cache."))
    rows = []
    for (uri, digest, _), (cache, readers) in found.items():
        size = "unknown" if cache.bytes_per_frame is None else size_text(cache.bytes_per_frame)
        cells = [
            _text(element("code", uri)),
            _text(element("code", (digest or "unknown")[:_DIGITS])),
            _text(_teacher(uri)),
            _text(", ".join(cache.signals)),
            Cell(size),
            _text(", ".join(readers)),
        ]
        rows.append((cache.name, cells))
    heads = ["name", "address", "digest", "teacher", "signals read", "bytes / frame", "read by"]
    return block(title, result_table("Caches that the distilled runs read.", heads, rows, "text"))


def _text(content: Content) -> Cell:
    return Cell(content, words=True)


def _teacher(uri: str) -> str:
    try:
        return str(info(uri)["teacher"])
    except (BevkdError, OSError):
        return "the cache cannot be opened from here"


def _commands(scene: Scene, command: Sequence[str]) -> Html:
    lines = [line for shown in scene.methods for run in shown.runs for line in [_again(shown, run)]]
    few, others = lines[:3], lines[3:]
    content: list[Content] = [
        small("A run's folder holds its whole recipe, so each can be repeated bit by bit on a CPU:"),
        _code(few),
    ]
    if others:
        content.append(folded(f"{len(others)} more", _code(others)))
    content += [small("This page:"), _code([shlex.join(["bevkd", "report", *command])])]
    return block("Commands", *content)


def _again(shown: Shown, run: Run) -> str:
    trained = "train-teacher" if shown.role == "teacher" else "train-student"
    return shlex.join(["bevkd", trained, str(run.folder / "recipe.yaml"), "--out", f"{run.folder}-again"])


def _code(lines: Sequence[str]) -> Html:
    return element("pre", element("code", "\n".join(lines)), tabindex=0)


def _versions() -> Html:
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return block("Versions", small(f"This page was written with {versions}."))
