"""The methods of a comparison as the page shows them: the best first, each with a colour of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from bevkd.viz.html.tables import DASH
from pipeline.compare import Comparison, Gain, Method, compare_runs
from pipeline.estimate import Estimate
from pipeline.figures import Figure, figures_of
from pipeline.runs import Role, Run

TONES = 6
"""How many distilled methods have a colour of their own."""


@dataclass(frozen=True)
class Shown:
    """A method and its looks.

    Attributes:
        name: as the page writes it.
        tone: colour class of the page.
        base: the plain student that it is compared with, None if there is none.
    """

    method: Method
    name: str
    tone: str
    base: Shown | None = None

    @property
    def role(self) -> Role:
        """Whose runs these are."""
        return self.method.role

    @property
    def runs(self) -> tuple[Run, ...]:
        """One per seed."""
        return self.method.runs

    @property
    def gain(self) -> Gain | None:
        """Over the plain student, None where no run of it has the same seed, labels and steps."""
        return self.method.gain

    @property
    def paired(self) -> tuple[Run, ...]:
        """Those of its runs that have a partner among the plain ones, or all if none has."""
        seeds = {seed for seed, _ in self.gain.pairs} if self.gain else set()
        return tuple(run for run in self.runs if run.seed in seeds) or self.runs

    @property
    def partners(self) -> tuple[Run, ...]:
        """Runs of the plain student that its own are compared with, or all if none has the same seed."""
        base = self.base.runs if self.base else ()
        seeds = {seed for seed, _ in self.gain.pairs} if self.gain else set()
        return tuple(run for run in base if run.seed in seeds) or base

    @property
    def layer(self) -> str:
        """The tone as the page's switches name it."""
        return self.tone.removeprefix("c-")

    def values(self, figure: Figure) -> list[tuple[Run, float]]:
        """Return a figure of each run that has it, as it is shown."""
        found = [(run, figures_of(run.metrics or {}).get(figure)) for run in self.runs]
        return [(run, figure.factor * value) for run, value in found if value is not None]


@dataclass(frozen=True)
class Scene:
    """Everything that the page speaks of.

    Attributes:
        methods: plain students, distilled ones and teachers, each the best first.
        main: the figure that the page speaks of, None if no run was evaluated.
        figures: all figures that any run has.
    """

    methods: tuple[Shown, ...]
    main: Figure | None
    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]

    def of(self, role: Role) -> tuple[Shown, ...]:
        """Return the methods of a role."""
        return tuple(each for each in self.methods if each.role == role)

    @property
    def students(self) -> tuple[Shown, ...]:
        """All methods but teachers, or all if there are no others."""
        return tuple(each for each in self.methods if each.role != "teacher") or self.methods

    def few(self, distilled: int) -> tuple[Shown, ...]:
        """Return the best plain student and teacher, and the best ``distilled`` methods."""
        return (*self.of("plain")[:1], *self.of("distilled")[:distilled], *self.of("teacher")[:1])


def scene_of(runs: Sequence[Run]) -> Scene:
    """Return the methods of ``runs``; of those that were not evaluated there is no score, only their course.

    Raises:
        ContractError: the metrics of the runs are not of one kind.
    """
    scored = [run for run in runs if run.metrics is not None]
    silent = [run for run in runs if run.metrics is None]
    compared = compare_runs(scored) if scored else Comparison((), ())
    known = {method.name for method in compared.methods}
    methods = [*compared.methods, *(_unscored(own) for own in _by_method(silent) if own[0].method not in known)]
    figures = tuple(compared.figures)
    main = figures[0] if figures else None

    def rank(method: Method) -> tuple[float, str]:
        return (-method.figures[main].mean if main and main in method.figures else math.inf, method.name)

    methods.sort(key=rank)
    plain, distilled, teachers = (
        [method for method in methods if method.role == role] for role in ("plain", "distilled", "teacher")
    )
    # Roles have colours of their own; further plain students and teachers take the next free ones.
    others = [*distilled, *plain[1:], *teachers[1:]]
    tones = {method.name: f"c-d{number % TONES}" for number, method in enumerate(others)}
    tones |= {own[0].name: f"c-{role}" for role, own in (("plain", plain), ("teacher", teachers)) if own}
    students = {method.name: _shown(method, tones[method.name]) for method in plain}
    shown = [
        *students.values(),
        *(replace(_shown(method, tones[method.name]), base=_base(method, students)) for method in distilled),
        *(_shown(method, tones[method.name]) for method in teachers),
    ]
    warnings = [*compared.warnings]
    if scored and silent:
        folders = ", ".join(str(run.folder) for run in silent)
        warnings.append(f"not evaluated, and so without scores: {folders}")
    return Scene(tuple(shown), main, figures, tuple(warnings))


def text(estimate: Estimate | None, figure: Figure) -> str:
    """Return mean and spread as people read them, a dash for what is unknown."""
    if estimate is None:
        return DASH
    digits = 2 if figure.group == "error" else 1
    spread = "" if estimate.spread is None else f" ± {figure.factor * estimate.spread:.{digits}f}"
    return f"{figure.factor * estimate.mean:.{digits}f}{spread}"


def class_table(run: Run) -> dict[str, dict[str, float]]:
    """Return the average precision of a run in points by class, and of each class by matching distance or difficulty.

    A class's first column is its average precision itself. Empty if the run was not evaluated.
    """
    metrics: Any = run.metrics or {}
    if "NDS" in metrics:
        by_class = {name: metrics["per_class"][name] for name in metrics["classes_present"]}
        table = {
            name: {"AP": score["ap"], **{f"{float(d):g} m": ap for d, ap in score["ap_by_distance"].items()}}
            for name, score in by_class.items()
        }
    elif "ap_r40" in metrics:
        table = {
            name: {f"{kind} {level}": ap for kind in ("3D", "BEV") for level, ap in scores[kind].items()}
            for name, scores in metrics["ap_r40"].items()
        }
    else:
        table = {
            name: {f"{kind} AP": score[kind]["ap"] for kind in ("mask", "box")}
            for name, score in metrics.get("per_class", {}).items()
        }
    return {
        name: {column: math.nan if ap is None else 100 * float(ap) for column, ap in columns.items()}
        for name, columns in table.items()
    }


def mean_class_table(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the mean of the :func:`class_table` of runs, as far as all of them have a class."""
    tables = [class_table(run) for run in runs if run.metrics is not None]
    if not tables:
        return {}
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    return {
        name: {column: fmean(table[name][column] for table in tables) for column in tables[0][name]} for name in shared
    }


def _by_method(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(run)
    return [tuple(own) for own in grouped.values()]


def _unscored(runs: tuple[Run, ...]) -> Method:
    first = runs[0]
    seconds = fmean(run.step_seconds for run in runs)
    return Method(first.method, first.role, runs, {}, seconds, first.cache_bytes_per_frame)


def _shown(method: Method, tone: str) -> Shown:
    for role, written in (("plain", "plain student"), ("teacher", "teacher")):
        if method.role == role and method.name.startswith(role):
            return Shown(method, written + method.name.removeprefix(role), tone)
    return Shown(method, method.name, tone)


def _base(method: Method, bases: dict[str, Shown]) -> Shown | None:
    if method.gain and method.gain.over in bases:
        return bases[method.gain.over]
    return next(iter(bases.values()), None)
