"""What each term of a distilled student is worth: the student trained with some of its terms, several seeds each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import yaml

from bevkd.errors import BevkdError, ConfigError, ContractError, TrainingError, report
from bevkd.models.detector import Detector
from bevkd.progress import Progress, Silent
from bevkd.training.checkpoint import write_atomic
from pipeline.compare import Comparison, compare_runs
from pipeline.compare_report import write_comparison
from pipeline.evaluate import open_evaluation
from pipeline.figures import figures_of
from pipeline.jobs import Job, cuda_devices, run_jobs
from pipeline.parts import other_recipe
from pipeline.recipe import DistillConfig, StudentRecipe
from pipeline.runs import Run, read_runs
from pipeline.terms import Term, active_terms, all_terms, terms_text, with_terms
from pipeline.train_student import prepare_student
from pipeline.training import frames_to_train_on

Kind = Literal["each", "add", "drop", "all"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHOWN_LOGS = 3


@dataclass(frozen=True)
class Point:
    """One run of an ablation.

    Attributes:
        method: which terms it has, ``plain`` without any.
        job: how it is trained.
    """

    method: str
    seed: int
    recipe: StudentRecipe
    job: Job


@dataclass(frozen=True)
class Planned:
    """What is to be done of a run.

    Attributes:
        step: up to which it has been trained.
        seconds: that the rest will take alone; None before any run has finished.
    """

    method: str
    seed: int
    run: Path
    steps: int
    step: int
    seconds: float | None


@dataclass(frozen=True)
class Ablation:
    """What became of a grid.

    Attributes:
        comparison: of all runs that have finished; None if none has.
        failed: those that have not.
        written: files of the comparison.
    """

    comparison: Comparison | None
    failed: tuple[Job, ...]
    written: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison's plain values, and the folders of runs that failed."""
        values = self.comparison.to_json() if self.comparison else {"rows": [], "summary": [], "warnings": []}
        return {**values, "failed": [str(job.run) for job in self.failed]}

    @property
    def error(self) -> TrainingError | None:
        """What to tell of runs that failed, with the end of their logs."""
        if not self.failed:
            return None
        shown = [f"{job.name}, the end of {job.log}:\n{job.last_words}" for job in self.failed[:_SHOWN_LOGS]]
        names = ", ".join(job.name for job in self.failed)
        return TrainingError(
            f"{len(self.failed)} runs failed: {names}. Once the cause is gone, run the same command again: it trains "
            "only what is missing.\n" + "\n".join(shown)
        )


def grid_of(terms: Sequence[Term], kinds: Sequence[Kind]) -> list[tuple[Term, ...]]:
    """Return the selections of terms to train with, each once: none first, all of them last.

    Args:
        kinds: ``each`` term alone; ``add`` one more at a time, in order; ``drop`` each from all; ``all`` selections.
    """
    count = len(terms)
    chosen: list[tuple[Term, ...]] = []
    for kind in kinds:
        if kind == "each":
            chosen += [(term,) for term in terms]
        elif kind == "add":
            chosen += [tuple(terms[:size]) for size in range(1, count)]
        elif kind == "drop":
            chosen += [tuple(term for term in terms if term != left) for left in terms]
        else:
            chosen += [some for size in range(1, count) for some in combinations(terms, size)]
    whole = tuple(terms)
    return [(), *dict.fromkeys(some for some in chosen if some and some != whole), whole]


def chosen_terms(distill: DistillConfig, names: Sequence[str]) -> tuple[Term, ...]:
    """Return the terms of an ablation, in the order of ``names``; without names all that the recipe weighs above 0.

    Args:
        names: ``LOSS.WEIGHT``, or ``LOSS`` for all of its weights above 0; the loss by its label in the log.

    Raises:
        ConfigError: names everything that is no term of the recipe, or is switched off in it; or there is no term.
    """
    known, active = all_terms(distill.losses), active_terms(distill.losses)
    found: dict[Term, None] = {} if names else dict.fromkeys(active)
    faults = []
    for name in names:
        fitting = [term for term in known if name in (str(term), term.loss)]
        on = [term for term in fitting if term in active]
        found |= dict.fromkeys(on)
        if not fitting:
            faults.append(f"'{name}' is none of: {', '.join(map(str, known))}")
        elif not on:
            faults.append(f"'{name}' has the weight 0 in the recipe: give it one with --set")
    if faults:
        raise report(ConfigError, "--terms:", faults)
    if not found:
        raise ConfigError("the recipe has no distillation term with a weight above 0, so there is nothing to ablate.")
    return tuple(found)


def plan(
    recipe: StudentRecipe, out: Path, names: Sequence[str], kinds: Sequence[Kind], seeds: Sequence[int]
) -> list[Point]:
    """Return every run of the grid, seed by seed, so that a stopped ablation has whole comparisons.

    Raises:
        ConfigError: the recipe is not one of a cached distilled student with an evaluation; or see
            :func:`chosen_terms`.
    """
    distill = recipe.distill
    if distill is None:
        raise ConfigError(
            "this recipe has no 'distill', so it has no terms to ablate. Give that of a distilled student."
        )
    if distill.teacher == "online":
        raise ConfigError("an ablation trains from caches: set distill.teacher: cached, and give them with --cache.")
    if recipe.evaluation is None:
        raise ConfigError("this recipe has no 'evaluation', so its runs could not be compared. Add one.")
    points = []
    grid = grid_of(chosen_terms(distill, names), kinds)
    # Without any label there is nothing that a plain student could learn from.
    grid = [terms for terms in grid if terms or getattr(recipe.data, "labels", None) not in (0, ())]
    for seed in seeds:
        training = recipe.training.model_copy(update={"seed": seed})
        for terms in grid:
            kept = distill.model_copy(update={"losses": with_terms(distill.losses, terms)}) if terms else None
            own = recipe.model_copy(update={"training": training, "distill": kept})
            points.append(_point(own, terms_text(distill.losses, terms) or "plain", seed, out))
    return points


def _point(recipe: StudentRecipe, method: str, seed: int, out: Path) -> Point:
    name = f"{method.replace(' + ', '_')}-{seed}"
    run, file = out / "runs" / name, out / "recipes" / f"{name}.yaml"
    command = (sys.executable, "-m", "cli", "train-student", str(file), "--out", str(run), "--resume")
    return Point(method, seed, recipe, Job(name, command, run, out / "logs" / f"{name}.log", recipe.training.steps))


def check(points: Sequence[Point], progress: Progress) -> None:
    """Check the recipes of all runs against caches, data set and model, and that the folders of runs are theirs.

    Raises:
        ContractError: lists every fault of every selection of terms.
        TrainingError: folders hold runs of another recipe; lists them.
    """
    foreign = [
        f"{point.job.run}: {different[0]}"
        for point in points
        if (point.job.run / "recipe.yaml").exists() and (different := other_recipe(point.job.run, point.recipe))
    ]
    if foreign:
        raise report(TrainingError, "these folders hold runs of another recipe; choose another --out:", foreign)
    faults, first = [], {point.method: point for point in reversed(points)}
    with progress.task("checking", len(first), "method") as task:
        for method, point in first.items():
            try:
                source, _, distillation = prepare_student(point.recipe, Silent())
                frames_to_train_on(source, distillation)
            except BevkdError as error:
                faults.append(f"{method}: {error}")
            task.advance()
    if faults:
        raise report(ContractError, "this grid cannot be trained:", faults)
    recipe = points[0].recipe
    assert recipe.evaluation is not None
    classes: Sequence[str] = recipe.data.classes  # type: ignore[attr-defined]
    open_evaluation(recipe.evaluation, Detector(recipe.detector, tuple(classes)), progress)


def outlook(points: Sequence[Point]) -> list[Planned]:
    """Return what is left to do of each run, and how long it will take as far as finished runs say."""
    known: dict[str, list[float]] = {}
    for run in _finished(points):
        known.setdefault(run.method, []).append(run.step_seconds)
    every = [seconds for of_method in known.values() for seconds in of_method]
    planned = []
    for point in points:
        step = point.job.steps if point.job.finished else point.job.step
        seconds = (point.job.steps - step) * fmean(known.get(point.method, every)) if every else None
        planned.append(Planned(point.method, point.seed, point.job.run, point.job.steps, step, seconds))
    return planned


def ablate(points: Sequence[Point], out: Path, at_once: int | None, progress: Progress) -> Ablation:
    """Train every run of a checked grid that is not finished, and compare all that are.

    Args:
        at_once: runs that train side by side; None takes one per GPU, without GPUs one.
    """
    for point in points:
        file = out / "recipes" / f"{point.job.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, yaml.safe_dump(point.recipe.model_dump(mode="json"), sort_keys=False).encode())
    jobs = [point.job for point in points if not point.job.finished]
    progress.note(f"{len(points)} runs, {len(points) - len(jobs)} of them finished already")
    devices = cuda_devices(points[0].recipe.device)
    failed = run_jobs(jobs, at_once or max(1, len(devices)), devices, progress, _result_text) if jobs else []
    runs = _finished(points)
    if not runs:
        return Ablation(None, tuple(failed), ())
    comparison = compare_runs(runs)
    return Ablation(comparison, tuple(failed), tuple(write_comparison(comparison, out)))


def _finished(points: Sequence[Point]) -> list[Run]:
    """Return the runs that have finished, their methods called as in the grid."""
    folders = {point.job.run: point.method for point in points if point.job.finished}
    return [replace(run, method=folders[run.folder]) for run in read_runs(list(folders))] if folders else []


def _result_text(job: Job) -> str:
    result = json.loads((job.run / "result.json").read_bytes())
    first, value = next(iter(figures_of(result["metrics"]).items()))
    return f"{job.name}: {first.name} {first.factor * value:.1f}, {result['steps'] * result['step_seconds']:.0f} s"
