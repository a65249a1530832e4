"""How training went: each figure of the log as a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bevkd.viz.html.charts import Curve, legend, line_chart
from bevkd.viz.html.element import Html, element
from bevkd.viz.html.page import Section, block, note, small
from pipeline.reporting.methods import TONES, Scene, Shown

_SKIPPED = frozenset({"step", "seconds"})
_GROUPS = (
    ("Loss", lambda key: key == "loss" or key.startswith(("detection/", "segmentation/"))),
    ("In-loop evaluation", lambda key: key.startswith("validation/")),
    ("Gradients and learning rate", lambda key: "gradient" in key or key.startswith("learning_rate")),
    ("Terms of distillation", lambda key: bool(key)),
)
_OF_LABELS = ("detection/heatmap", "detection/box")
"""Terms that are zero where no frame of the batch has labels, which is no success."""

_TITLES = {"loss": "total loss", "learning_rate": "learning rate", "gradient_norm": "gradient norm, before clipping"}


def curves_section(scene: Scene) -> Section:
    """Return a chart per logged figure with a curve per run, in groups."""
    methods = _shown(scene)
    logs = {shown.name: [(run, run.log()) for run in shown.runs] for shown in methods}
    keys = dict.fromkeys(
        key
        for runs in logs.values()
        for _, lines in runs
        for line in lines
        for key, value in line.items()
        if key not in _SKIPPED and isinstance(value, int | float) and math.isfinite(value)
    )
    if not keys:
        content: list[Html | None] = [note("The run folders hold no log.jsonl with figures.")]
        return Section("curves", "Training", "How training went", None, content)
    content = [legend({shown.name: shown.tone for shown in methods})]
    left = list(keys)
    charts: dict[str, list[str]] = {}
    for group, belongs in _GROUPS:
        charts[group] = [key for key in left if belongs(key)]
        left = [key for key in left if key not in charts[group]]
    for group in ("Loss", "Terms of distillation", "Gradients and learning rate", "In-loop evaluation"):
        if charts[group]:
            drawn = [_chart(key, methods, logs) for key in charts[group]]
            content.append(block(group, element("div", drawn, class_="charts")))
    hidden = len(scene.students) - len(methods)
    remark = (
        "Faint: as logged. Thin: smoothed, one line per seed. Bold: their mean. The detection terms leave out steps "
        "without a labelled frame."
    )
    content.append(small(remark + (f" {hidden} further methods are left out." if hidden > 0 else "")))
    return Section("curves", "Training", "How training went", None, content)


def _shown(scene: Scene) -> Sequence[Shown]:
    """Return the students that have a colour of their own; teachers learn other losses at another scale."""
    distilled = scene.of("distilled")[:TONES]
    return (*scene.of("plain")[:1], *distilled) or scene.methods[:TONES]


def _chart(key: str, methods: Sequence[Shown], logs: Mapping[str, Any]) -> Html:
    curves = [
        Curve(shown.name, shown.tone, points, f"{shown.name}, seed {run.seed}")
        for shown in methods
        for run, lines in logs[shown.name]
        if (points := _points(lines, key))
    ]
    title = _TITLES.get(key, key.replace("/", " · ").replace("_", " "))
    return line_chart(title, curves, linear=key.startswith("learning_rate"))


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if key in _OF_LABELS:
        found = [(step, value) for step, value in found if value != 0]
    return tuple((float(step), float(value)) for step, value in found if math.isfinite(value))
