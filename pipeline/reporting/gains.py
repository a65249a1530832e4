"""Where the student gained: by class, by matching distance, by distance from the ego."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from bevkd.viz.html.charts import FAR, Series, legend, range_chart
from bevkd.viz.html.element import Content, Html, element
from bevkd.viz.html.page import Section, block, note, small
from bevkd.viz.html.tables import DASH, Cell, Gain, decimal, heat_table, ramp, result_table, signed
from pipeline.reporting.detections import Detections, Judged
from pipeline.reporting.methods import Scene, Shown, class_table, mean_class_table

RANGES_M = (0, 10, 20, 30, 50)
SHOWN = 3
"""Most distilled methods that have a table or a line of their own."""


def gains_section(scene: Scene, detections: Detections | str) -> Section:
    """Return what the best methods gained by class and by range, or what is missing to tell."""
    lead = "Blue where the distilled student is better than the plain one, orange where it is worse, in points of AP."
    content = [_by_class(scene), _by_range(scene, detections)]
    return Section("gains", "Gains", "Where the student gained", lead if scene.of("distilled") else None, content)


def _by_class(scene: Scene) -> Html:
    title = "By class and matching distance"
    tables = [(each, gains) for each in scene.of("distilled")[:SHOWN] if (gains := _gains(each))]
    if not tables:
        return block(title, note("This table needs a plain and a distilled student with the same evaluation."))
    everything = [gain.points for _, rows in tables for gains in rows.values() for gain in gains.values()]
    deepest = max(5.0, math.ceil(max((abs(each) for each in everything if math.isfinite(each)), default=0.0)))
    drawn = [element("div", _heading(each), _heat(each, rows, deepest)) for each, rows in tables]
    remark = (
        "AP is the mean over the matching distances: how near the centre of a detection must be to that of the object."
        if any("AP" in gains for _, rows in tables for gains in rows.values())
        else "Average precision by the benchmark's overlap and difficulty."
    )
    bold = " Bold gains are larger than their standard deviation over seeds." if _seeds(tables[0][0]) else ""
    explained = element(
        "div", ramp(deepest), small(f"{remark} Below each gain stand the scores, plain to distilled.{bold}")
    )
    return block(title, element("div", drawn, explained, class_="pair"))


def _gains(shown: Shown) -> dict[str, dict[str, Gain]]:
    """Return what a method gains over its plain student by class and column; empty without one."""
    if shown.base is None:
        return {}
    runs = (shown.partners, shown.paired)
    before, after = (_with_mean(mean_class_table(own)) for own in runs)
    tables = [{run.seed: _with_mean(class_table(run)) for run in own} for own in runs]
    pairs = [[table[seed] for table in tables] for seed in _seeds(shown)]

    def gain(name: str, column: str) -> Gain:
        points = [second[name][column] - first[name][column] for first, second in pairs]
        return Gain(before[name][column], after[name][column], stdev(points) if points else math.nan)

    return {name: {column: gain(name, column) for column in after[name]} for name in after if name in before}


def _with_mean(table: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Return a table with the mean over its classes below them, where there are several."""
    if len(table) < 2:
        return dict(table)
    columns = next(iter(table.values()))
    return {**table, "mean": {column: _mean([scores[column] for scores in table.values()]) for column in columns}}


def _seeds(shown: Shown) -> list[int]:
    """Return the seeds that a method shares with its plain student, if there are several."""
    seeds = [seed for seed, _ in shown.gain.pairs] if shown.gain else []
    return seeds if len(seeds) > 1 and len(set(seeds)) == len(seeds) else []


def _heading(shown: Shown) -> Html:
    return element("h4", element("span", class_="swatch"), shown.name, class_=shown.tone)


def _heat(shown: Shown, rows: Mapping[str, Mapping[str, Gain]], deepest: float) -> Html:
    columns = list(next(iter(rows.values())))
    listed = [(name.replace("_", " "), [gains[column] for column in columns]) for name, gains in rows.items()]
    against = shown.base.name if shown.base else "the plain student"
    return heat_table(f"Gain of {shown.name} over {against}, in points", "class", columns, listed, deepest)


def _by_range(scene: Scene, detections: Detections | str) -> Html:
    title = "By distance from the ego"
    if isinstance(detections, str):
        return block(title, note(detections))
    edges = [edge for edge in RANGES_M if edge < detections.limit_m]
    edges.append(RANGES_M[-1] if detections.limit_m >= RANGES_M[-1] else math.ceil(detections.limit_m))
    edges = sorted(dict.fromkeys(edges))
    first = next(iter(detections.judged.values())).outcome
    ranges = [(low, high) for low, high in pairwise(edges) if first.objects(low, high)]
    if not ranges:
        return block(title, note("The frames of the evaluation hold no annotated object within 50 m."))
    names = [f"{low}{DASH}{high} m" for low, high in ranges]
    methods = [each for each in scene.few(SHOWN) if any(run.folder in detections.judged for run in each.runs)]
    charts, tables = [], []
    for what, value in (("Mean AP", _precision), ("Found objects, %", _recall)):
        series = [_series(each, detections, ranges, value) for each in methods]
        charts.append(range_chart(what, names, _near(methods, series), "points"))
        rows = _range_rows(methods, series)
        if what == "Mean AP":
            rows.append(("annotated objects", [Cell(str(first.objects(low, high))) for low, high in ranges]))
        tables.append(result_table(what, ["", *names], rows, kind="captionless"))
    remark = (
        "Each object counts at its own distance, each false alarm at its own. An object is found if a detection of its "
        "class lies within 2 m of its centre, by detections above the score at which the run has its best F1 over all "
        "frames. AP is over matching distances of 0.5 to 4 m. A teacher far above the students is in the tables only."
    )
    columns = [element("div", chart, table) for chart, table in zip(charts, tables, strict=True)]
    return block(
        title,
        legend({each.name: each.tone for each in methods}),
        element("div", columns, class_="pair"),
        small(remark),
        note("Left out:", *detections.missing, warning=True) if detections.missing else None,
    )


def _near(methods: Sequence[Shown], series: Sequence[Series]) -> list[Series]:
    """Return the series without that of a teacher whose values would press those of the students together."""
    students = [line for each, line in zip(methods, series, strict=True) if each.role != "teacher"]
    highest = max((value for line in students for value in line.values if math.isfinite(value)), default=math.inf)
    return [line for line in series if line in students or max(line.values) <= FAR * highest]


def _range_rows(methods: Sequence[Shown], series: Sequence[Series]) -> list[tuple[Content, Sequence[Cell]]]:
    """Return a row per method, and what the best distilled student gains over the plain one."""
    rows: list[tuple[Content, Sequence[Cell]]] = [
        (_label(each), _cells(line)) for each, line in zip(methods, series, strict=True)
    ]
    by_role = {each.role: line for each, line in reversed(list(zip(methods, series, strict=True)))}
    if "plain" in by_role and "distilled" in by_role:
        plain, best = by_role["plain"], by_role["distilled"]
        gains = [signed(after - before) for before, after in zip(plain.values, best.values, strict=True)]
        rows.append((element("b", f"gain of {best.name}"), [Cell(element("b", each)) for each in gains]))
    return rows


def _precision(judged: Judged, low: float, high: float) -> float:
    return judged.outcome.mean_ap(low, high)


def _recall(judged: Judged, low: float, high: float) -> float:
    return judged.outcome.recall(judged.min_score, low, high)


def _series(
    shown: Shown,
    detections: Detections,
    ranges: Sequence[tuple[int, int]],
    value: Callable[[Judged, float, float], float],
) -> Series:
    judged = [detections.judged[run.folder] for run in shown.runs if run.folder in detections.judged]
    values = [[100 * value(each, low, high) for each in judged] for low, high in ranges]
    spreads = tuple(stdev(each) if len(each) > 1 else math.nan for each in values)
    return Series(shown.name, shown.tone, tuple(fmean(each) for each in values), spreads)


def _cells(series: Series) -> list[Cell]:
    cells = []
    for value, spread in zip(series.values, series.spreads, strict=True):
        content: list[Content] = [decimal(value)]
        if math.isfinite(spread):
            content.append(element("small", f" ± {decimal(spread)}"))
        cells.append(Cell(content))
    return cells


def _label(shown: Shown) -> Html:
    return element("span", element("span", class_="swatch"), shown.name, class_=shown.tone)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the known values."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan
