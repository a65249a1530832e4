"""Runs side by side: what each method scores over its seeds, and what it gains over the plain student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np

from bevkd.config import apply_overrides, parse
from bevkd.data.sources.nuscenes import NuScenesSource
from bevkd.errors import ContractError, report
from bevkd.evaluation import resample
from bevkd.evaluation.nuscenes import read_results
from bevkd.evaluation.resample import Floats
from bevkd.progress import Progress, Silent
from pipeline.estimate import Estimate
from pipeline.figures import Figure, figures_of
from pipeline.pairing import Partners, baselines, fairness, pair
from pipeline.parts import open_source
from pipeline.recipe import EvaluationConfig
from pipeline.runs import Role, Run, read_runs

_ORDER: tuple[Role, ...] = ("plain", "distilled", "teacher")


@dataclass(frozen=True)
class Gain:
    """What a method gains over the plain student, run by run of the same seed.

    Attributes:
        over: the plain method.
        pairs: differences of the first figure, by seed.
        figures: of the differences, run minus plain: of errors, less is better.
        scenes: 95 % interval of the first figure's mean over resampled scenes, with ``--bootstrap``.
    """

    over: str
    pairs: tuple[tuple[int, float], ...]
    figures: Mapping[Figure, Estimate]
    scenes: tuple[float, float] | None = None


@dataclass(frozen=True)
class Method:
    """All runs of a method.

    Attributes:
        runs: one per seed.
        gain: None where no plain run has the same seed, labels and steps.
        scenes: 95 % interval of the first figure's mean over resampled scenes, with ``--bootstrap``.
    """

    name: str
    role: Role
    runs: tuple[Run, ...]
    figures: Mapping[Figure, Estimate]
    step_seconds: float
    cache_bytes_per_frame: float | None
    gain: Gain | None = None
    scenes: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Attributes:
        methods: what gains are over, plain students, distilled ones, teachers.
        warnings: why some of them may not be compared.
        bootstrap: how often scenes were drawn, 0 if they were not.
    """

    methods: tuple[Method, ...]
    warnings: tuple[str, ...]
    bootstrap: int = 0

    @property
    def figures(self) -> list[Figure]:
        """All figures that any method has, the most telling first."""
        return list(dict.fromkeys(figure for method in self.methods for figure in method.figures))

    def to_json(self) -> dict[str, Any]:
        """Return ``rows``, one per run, ``summary``, one per method, and ``warnings``."""
        return {
            "rows": [row(run) for method in self.methods for run in method.runs],
            "summary": [_summary(method) for method in self.methods],
            "warnings": list(self.warnings),
            "bootstrap": self.bootstrap,
        }


def compare(
    places: Sequence[Path],
    plain: str | None = None,
    bootstrap: int = 0,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Return the comparison of finished runs.

    Args:
        places: run folders, and folders that hold such.
        plain: label of the method that gains are over; None takes plain students.
        bootstrap: how often the scenes of the evaluation are drawn anew for intervals; 0 does not.
        overrides: change the recipes' ``evaluation`` for the bootstrap, e.g. where the data lies.

    Raises:
        ConfigError, ContractError: a place holds no run, runs are unfinished or without metrics, or their metrics are
            not those of one data set.
    """
    return compare_runs(read_runs(places), plain, bootstrap, overrides, progress)


def compare_runs(
    runs: Sequence[Run],
    plain: str | None = None,
    bootstrap: int = 0,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Return the comparison of runs that are read; see :func:`compare`."""
    check_metrics(runs)
    base = baselines(runs, plain)
    runs = sorted(runs, key=lambda each: (each not in base, _ORDER.index(each.role)))
    partners, unclear = pair(runs, base)
    drawn = resampled(runs, bootstrap, overrides, progress or Silent()) if bootstrap else {}
    together: dict[tuple[Role, str], list[Run]] = {}
    for run in runs:
        together.setdefault((run.role, run.method), []).append(run)
    methods = tuple(_method(same, partners, drawn) for same in together.values())
    return Comparison(methods, (*fairness(runs, partners), *unclear), bootstrap)


def _method(runs: Sequence[Run], partners: Partners, drawn: Mapping[Path, Floats]) -> Method:
    runs = sorted(runs, key=lambda run: run.seed)
    sizes = [run.cache_bytes_per_frame for run in runs]
    return Method(
        name=runs[0].method,
        role=runs[0].role,
        runs=tuple(runs),
        figures=_estimates([figures_of(run.metrics or {}) for run in runs]),
        step_seconds=fmean(run.step_seconds for run in runs),
        cache_bytes_per_frame=None if None in sizes else fmean(size for size in sizes if size is not None),
        gain=_gain([(run, partners[run.folder]) for run in runs if run.folder in partners], drawn),
        scenes=_scenes([drawn[run.folder] for run in runs]) if drawn else None,
    )


def _gain(pairs: Sequence[tuple[Run, Run]], drawn: Mapping[Path, Floats]) -> Gain | None:
    if not pairs:
        return None
    differences = []
    for run, plain in pairs:
        ours, theirs = figures_of(run.metrics or {}), figures_of(plain.metrics or {})
        differences.append({figure: value - theirs[figure] for figure, value in ours.items() if figure in theirs})
    first = next(iter(differences[0]))
    return Gain(
        over=", ".join(dict.fromkeys(plain.method for _, plain in pairs)),
        pairs=tuple((run.seed, each[first]) for (run, _), each in zip(pairs, differences, strict=True)),
        figures=_estimates(differences),
        scenes=_scenes([drawn[run.folder] - drawn[plain.folder] for run, plain in pairs]) if drawn else None,
    )


def _estimates(runs: Sequence[Mapping[Figure, float]]) -> dict[Figure, Estimate]:
    """Return the estimate of every figure that all runs have."""
    shared = [figure for figure in runs[0] if all(figure in run for run in runs)]
    return {figure: Estimate.of([run[figure] for run in runs]) for figure in shared}


def _scenes(values: Sequence[Floats]) -> tuple[float, float]:
    return resample.interval(np.mean(values, axis=0))


def resampled(runs: Sequence[Run], count: int, overrides: Sequence[str], progress: Progress) -> dict[Path, Floats]:
    """Return the mean AP over the classes present of each run, by its folder, on the same ``count`` draws of scenes.

    Args:
        overrides: of the recipes, of which ``evaluation`` counts.

    Raises:
        ContractError: runs without detections of nuScenes' format, or scored on different frames.
    """
    faults = [f"{run.folder}: {fault}" for run in runs if (fault := _not_resampled(run))]
    if faults:
        raise report(
            ContractError, "--bootstrap draws scenes of nuScenes' format and scores detections on them:", faults
        )
    matched = {}
    with progress.task("matching detections", len(runs), "run") as task:
        for run in runs:
            matched[run.folder] = _matched(run, overrides)
            task.advance()
    scenes = matched[runs[0].folder].scenes
    if other := [str(folder) for folder, each in matched.items() if each.scenes != scenes]:
        raise report(
            ContractError, f"--bootstrap draws the same scenes for all runs; other than {runs[0].folder} have:", other
        )
    draws = resample.draw_scenes(len(scenes), count)
    found = {}
    with progress.task("drawing scenes", len(runs), "run") as task:
        for folder, matches in matched.items():
            found[folder] = resample.mean_ap(resample.average_precisions(matches, draws))
            task.advance()
    return found


def _not_resampled(run: Run) -> str | None:
    if "NDS" not in (run.metrics or {}):
        return "has other metrics; leave out --bootstrap"
    if run.detections is None:
        return "has no detections.json; write it with 'bevkd predict', or train again"
    return None


def _matched(run: Run, overrides: Sequence[str]) -> resample.Matches:
    values = apply_overrides(run.recipe.model_dump(mode="json"), overrides)
    where = f"the recipe of {run.folder}"
    config = parse(EvaluationConfig, values["evaluation"], where)
    source = cast(NuScenesSource, open_source(config.data, frozenset()))  # its metrics say so
    assert run.detections is not None
    return resample.match(source, read_results(run.detections), max_distance_m=config.max_distance_m)


def check_metrics(runs: Sequence[Run]) -> None:
    """Refuse runs without metrics, and metrics of several kinds.

    Raises:
        ContractError: names them.
    """
    if silent := [str(run.folder) for run in runs if run.metrics is None]:
        advice = "Train again with 'evaluation' in the recipe, or leave them out"
        raise report(ContractError, f"runs without metrics. {advice}:", silent)
    first = {run.folder: next(iter(figures_of(run.metrics or {})), None) for run in runs}
    if len(set(first.values())) > 1:
        kinds = [f"{folder}: {figure.name if figure else 'none'}" for folder, figure in first.items()]
        raise report(ContractError, "the metrics of these runs are not of one kind. Compare each kind apart:", kinds)


def row(run: Run) -> dict[str, Any]:
    """Return a run as one line of a table, with every figure of its metrics by its name in JSON."""
    return {
        "run": str(run.folder),
        "method": run.method,
        "role": run.role,
        "seed": run.seed,
        "labels": run.labels,
        "steps": run.steps,
        **{figure.key: value for figure, value in figures_of(run.metrics or {}).items()},
        "step_seconds": run.step_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "cache_bytes_per_frame": run.cache_bytes_per_frame,
    }


def _summary(method: Method) -> dict[str, Any]:
    gain = method.gain
    return {
        "method": method.name,
        "role": method.role,
        "runs": len(method.runs),
        "seeds": [run.seed for run in method.runs],
        **_plain_values(method.figures, method.scenes),
        "gain": {"over": gain.over, "pairs": len(gain.pairs), **_plain_values(gain.figures, gain.scenes)}
        if gain
        else None,
        "step_seconds": method.step_seconds,
        "cache_bytes_per_frame": method.cache_bytes_per_frame,
    }


def _plain_values(figures: Mapping[Figure, Estimate], scenes: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "mean": {figure.key: each.mean for figure, each in figures.items()},
        "spread": {figure.key: each.spread for figure, each in figures.items()},
        "interval": {figure.key: each.interval and list(each.interval) for figure, each in figures.items()},
        "scenes_interval": scenes and list(scenes),
    }
