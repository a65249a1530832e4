"""The first thing that a reader sees: what distillation was worth, in a sentence and a few figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bevkd.console import size_text
from bevkd.viz.html.charts import Dots, dot_rows
from bevkd.viz.html.element import Content, Html, element, markup
from bevkd.viz.html.page import Section, block, note, small, tile, tiles
from bevkd.viz.html.tables import decimal, signed
from pipeline.estimate import Estimate
from pipeline.figures import Figure, figures_of
from pipeline.reporting.methods import Scene, Shown, text
from pipeline.runs import Run


@dataclass(frozen=True)
class Finding:
    """What the best distilled method gains over its plain student, in points.

    Attributes:
        best_mean, base_mean: over the runs that are compared.
        pairs: differences between runs of the same seed, labels and steps; empty if there are none.
        paired: their mean and interval.
    """

    method: Shown
    base: Shown
    best_mean: float
    base_mean: float
    pairs: tuple[float, ...]
    paired: Estimate | None

    @property
    def gain(self) -> float:
        """Mean of the paired differences, or else the difference of the means."""
        return fmean(self.pairs) if self.pairs else self.best_mean - self.base_mean

    @property
    def clear(self) -> bool:
        """Whether the gain, or the loss, is more than seeds explain: its interval leaves out zero."""
        interval = self.paired.interval if self.paired else None
        return interval is not None and (interval[0] > 0 or interval[1] < 0)

    @property
    def consistent(self) -> bool:
        """Whether all pairs agree on the sign, and the gain is larger than it spreads."""
        spread = self.paired.spread if self.paired else None
        return spread is not None and len({pair > 0 for pair in self.pairs}) == 1 and abs(self.gain) > spread


def finding_of(scene: Scene) -> Finding | None:
    """Return what the distilled method with the best score gains, None without one or without a plain student."""
    for shown in scene.of("distilled"):
        if scene.main is None or shown.base is None:
            continue
        best, base = _scores(shown.paired, scene.main), _scores(shown.partners, scene.main)
        if best and base:
            pairs = tuple(scene.main.factor * points for _, points in shown.gain.pairs) if shown.gain else ()
            return Finding(shown, shown.base, fmean(best), fmean(base), pairs, Estimate.of(pairs) if pairs else None)
    return None


def _scores(runs: Sequence[Run], main: Figure) -> list[float]:
    """Return the score of each run that has it, as it is shown."""
    values = [figures_of(run.metrics or {}).get(main) for run in runs if run.metrics]
    return [main.factor * value for value in values if value is not None]


def finding_section(scene: Scene) -> Section:
    """Return the sentence, what qualifies it, key figures, and the score of every method and seed."""
    finding = finding_of(scene)
    content: list[Content] = [
        element("p", _eyebrow(scene), class_="eyebrow"),
        element("h1", _sentence(scene, finding)),
    ]
    if finding:
        content.append(element("p", _qualifier(finding), class_="lead"))
    content.append(tiles(*_tiles(scene, finding)))
    if scene.warnings:
        content.append(note("These runs differ in what a fair comparison needs equal:", *scene.warnings, warning=True))
    if scene.main:
        content.append(_overview(scene, scene.main))
    return Section("finding", "Finding", None, None, content)


def _sentence(scene: Scene, finding: Finding | None) -> Content:
    if scene.main is None:
        return "These runs were not evaluated, so there is no score to compare."
    score = scene.main.name
    if finding is None:
        shown = (*scene.of("distilled"), *scene.methods)[0]
        reached = markup(_name(shown), f" reaches {text(shown.method.figures.get(scene.main), scene.main)} {score}")
        lacking = ". No plain student is among the runs, so what distillation adds is not known."
        return markup(reached, lacking if shown.role == "distilled" else ".")
    name = _name(finding.method)
    scores = f"{decimal(finding.best_mean)} {score} against the {finding.base.name}'s {decimal(finding.base_mean)}"
    gain = element("em", f"{signed(finding.gain)} points", class_=finding.method.tone)
    if len(finding.pairs) < 2:
        return markup(name, f" has {scores}, ", gain, ": one pair of runs, a hint and not a finding.")
    if not finding.clear and finding.consistent:
        return markup(name, f" has {scores}, ", gain, f". {len(finding.pairs)} pairs of runs are too few to be sure.")
    if not finding.clear:
        return markup("No clear difference: ", name, f" has {scores}, ", gain, ", which seeds alone may explain.")
    points = element("em", f"{decimal(abs(finding.gain))} points", class_=finding.method.tone)
    verb = "gains" if finding.gain > 0 else "loses"
    return markup(
        name,
        f" {verb} ",
        points,
        f" of {score} over the {finding.base.name}: {decimal(finding.base_mean)} → {decimal(finding.best_mean)}.",
    )


def _qualifier(finding: Finding) -> str:
    pairs, paired = finding.pairs, finding.paired
    if not pairs or paired is None:
        return (
            "No plain run has the seed, labels and steps of a distilled one: this is the difference of two means, and "
            "what seeds add to it is not known."
        )
    if paired.interval is None or paired.spread is None:
        return "Seeds alone often differ by points. Train two more of both, with the same seeds, to know if this holds."
    better = sum(gain > 0 for gain in pairs)
    low, high = paired.interval
    return (
        f"Mean of {len(pairs)} pairs of runs with the same seed, labels and steps; better in {better} of {len(pairs)}. "
        f"The gain spreads by ± {decimal(paired.spread)} points from pair to pair; the 95 % interval of its mean goes "
        f"from {signed(low)} to {signed(high)}."
    )


def _tiles(scene: Scene, finding: Finding | None) -> list[Html]:
    tiles_: list[Html] = []
    main = scene.main
    if finding and main:
        kind = f"points, mean of {len(finding.pairs)} pairs" if len(finding.pairs) > 1 else "points, one pair"
        tiles_.append(tile(f"Gain in {main.name}", signed(finding.gain), kind if finding.pairs else "points, unpaired"))
        for name, shown in (("Plain student", finding.base), ("Distilled student", finding.method)):
            tiles_.append(tile(name, *_value(text(shown.method.figures.get(main), main)), _seeds(shown)))
    teacher = next((each for each in scene.of("teacher") if main in each.method.figures), None) if main else None
    if teacher and main:
        estimate = teacher.method.figures[main]
        gap = main.factor * estimate.mean - finding.base_mean if finding else 0.0
        way = (
            f"{100 * finding.gain / gap:.0f} % of the gap to it closed"
            if finding and min(gap, finding.gain) > 0
            else _seeds(teacher)
        )
        tiles_.append(tile("Teacher", *_value(text(estimate, main)), way))
    shown = finding.method if finding else scene.methods[0]
    seconds, more = shown.method.step_seconds, None
    if finding:
        share = 100 * (seconds / finding.base.method.step_seconds - 1)
        more = f"{signed(share, 0)} % beside {finding.base.method.step_seconds:.3g} s of plain training"
    tiles_.append(tile("Training step", [f"{seconds:.3g}", element("small", " s")], more))
    size = shown.method.cache_bytes_per_frame
    if shown.role == "distilled" and size:
        value, _, unit = size_text(size).partition(" ")
        tiles_.append(tile("Cache per frame", [value, element("small", f" {unit}")], "what the losses read"))
    return tiles_


def _value(written: str) -> tuple[Content]:
    """Return a mean with its spread in small letters."""
    mean, plus_minus, spread = written.partition(" ± ")
    return ([mean, element("small", f" ± {spread}") if plus_minus else None],)


def _overview(scene: Scene, main: Figure) -> Html:
    rows = []
    for shown in scene.methods:
        if values := shown.values(main):
            labels = tuple(f"{run.folder}, seed {run.seed}: {value:.2f}" for run, value in values)
            written = text(shown.method.figures.get(main), main)
            points = tuple(value for _, value in values)
            rows.append(Dots(shown.name, shown.tone, points, labels, written, aside=shown.role == "teacher"))
    rows.sort(key=lambda row: -fmean(row.values))
    plain = [value for shown in scene.of("plain")[:1] for _, value in shown.values(main)]
    reference = fmean(plain) if plain and len(rows) > 1 else math.nan
    line = " The dashed line is the plain student." if math.isfinite(reference) else ""
    remark = f"Large dots are means, small ones seeds; ± is the standard deviation over seeds.{line}"
    return block(
        f"{main.name[:1].upper()}{main.name[1:]} of every method and seed",
        dot_rows(rows, reference if math.isfinite(reference) else None, "points"),
        small(remark),
    )


def _eyebrow(scene: Scene) -> str:
    runs = [run for shown in scene.methods for run in shown.runs]
    frames = sorted({int((run.metrics or {}).get("frames", 0)) for run in runs} - {0})
    scored = f", scored on {' or '.join(map(str, frames))} frames" if frames else ""
    return f"{_count(len(runs), 'run')} of {_count(len(scene.methods), 'method')}{scored}"


def _name(shown: Shown) -> Html:
    written = shown.name if shown.role == "distilled" else f"The {shown.name}"
    return element("em", written, class_=shown.tone)


def _seeds(shown: Shown) -> str:
    return _count(len(shown.runs), "seed")


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
