"""What each method scores and costs, and each of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bevkd.console import size_text
from bevkd.viz.html.element import Content, Html, element
from bevkd.viz.html.page import Section, folded, small
from bevkd.viz.html.tables import DASH, Cell, result_table, signed
from pipeline.figures import Figure, Group, figures_of, of_group
from pipeline.reporting.methods import Scene, Shown

_GROUPS: tuple[Group, ...] = ("headline", "distance", "error")
_WORDS = {
    "headline": "Mean AP is over the classes that occur in these frames; mAP and NDS are nuScenes' own, over all ten.",
    "error": "Errors of true positives, the less the better: ATE m, ASE 1 - IoU, AOE rad, AVE m/s, AAE 1 - accuracy.",
}


def results_section(scene: Scene) -> Section:
    """Return a table with a row per method, and one with a row per run behind a fold."""
    figures = [each for group in _GROUPS for each in of_group(scene.figures, group)]
    best = _best(scene, figures)
    gains = scene.main is not None and bool(scene.of("distilled"))
    heads: list[Content] = [
        "",
        "runs",
        *(["gain"] if gains else []),
        *(_head(figure) for figure in figures),
        "s / step",
        "cache / frame",
    ]
    rows = [(_name(shown), _cells(scene, shown, figures, best)) for shown in scene.methods]
    remarks = [words for group, words in _WORDS.items() if any(figure.group == group for figure in figures)]
    if not any(figure.key == "NDS" for figure in figures):
        remarks = []
    content = [
        result_table("Mean ± standard deviation over runs; scores in percent.", heads, rows),
        small(" ".join([*(["Marked: the best student."] if best else []), *remarks])) if figures else None,
        folded("Every run", _every_run(scene, figures)),
    ]
    return Section("results", "Results", "Results by method", None, content)


def _head(figure: Figure) -> Content:
    where, _, distance = figure.name.partition(" at ")
    return [where, element("small", distance)] if figure.group == "distance" else figure.name


def _name(shown: Shown) -> Html:
    return element("span", element("span", class_="swatch"), shown.name, class_=shown.tone)


def _best(scene: Scene, figures: Sequence[Figure]) -> dict[Figure, str]:
    """Return the best student of each headline figure, where there are several."""
    best = {}
    for figure in figures:
        scores = {
            shown.name: shown.method.figures[figure].mean
            for shown in scene.students
            if shown.role != "teacher" and figure in shown.method.figures
        }
        if figure.group == "headline" and len(scores) > 1:
            best[figure] = max(scores, key=lambda name: scores[name])
    return best


def _cells(scene: Scene, shown: Shown, figures: Sequence[Figure], best: dict[Figure, str]) -> list[Cell]:
    cells = [Cell(len(shown.runs), note=", ".join(f"seed {run.seed}" for run in shown.runs))]
    if scene.main and scene.of("distilled"):
        gained = shown.gain.figures.get(scene.main) if shown.gain else None
        cells.append(Cell(signed(scene.main.factor * gained.mean) if gained and shown.role == "distilled" else DASH))
    for figure in figures:
        estimate = shown.method.figures.get(figure)
        if estimate is None:
            cells.append(Cell(DASH))
            continue
        mean = _written(figure, estimate.mean)
        spread = None if estimate.spread is None else element("small", f"± {_written(figure, estimate.spread)}")
        marked = element("mark", mean) if best.get(figure) == shown.name else mean
        cells.append(Cell([marked, spread]))
    cells.append(Cell(f"{shown.method.step_seconds:.3g}"))
    size = shown.method.cache_bytes_per_frame
    reads = shown.role == "distilled" and bool(shown.runs[0].caches)
    cells.append(Cell(size_text(size) if reads and size is not None else "unknown" if reads else DASH))
    return cells


def _every_run(scene: Scene, figures: Sequence[Figure]) -> Html:
    heads: list[Content] = [
        "run",
        "method",
        "seed",
        "steps",
        "labels",
        *(_head(figure) for figure in figures),
        "s / step",
        "peak GB",
    ]
    rows = []
    for shown in scene.methods:
        for run in shown.runs:
            scores = figures_of(run.metrics or {}) if run.metrics else {}
            cells = [
                *(Cell(each) for each in (_name(shown), run.seed, f"{run.steps}", _labels(run.labels))),
                *(Cell(_written(figure, scores.get(figure, math.nan))) for figure in figures),
                Cell(f"{run.step_seconds:.3g}"),
                Cell(f"{run.peak_memory_bytes / 1e9:.2f}"),
            ]
            rows.append((element("code", str(run.folder)), cells))
    return result_table("One row per run; scores in percent.", heads, rows)


def _written(figure: Figure, value: float) -> str:
    return DASH if math.isnan(value) else f"{figure.factor * value:.{2 if figure.group == 'error' else 1}f}"


def _labels(labels: object) -> str:
    if isinstance(labels, float):
        return f"{100 * labels:.3g} %"
    return f"{len(labels)} scenes" if isinstance(labels, list | tuple) else str(labels)
