"""Which run is compared with which plain student, and what keeps a comparison from being fair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bevkd.errors import ConfigError
from pipeline.runs import Run

Partners = Mapping[Path, Run]
"""The plain run that a run is compared with, by the run's folder."""

_FRAMES = ("name", "version", "split", "scenes", "tokens", "classes", "skip_missing")
_LABELS = ("labels", "labels_seed")
_SHOWN = 4


def baselines(runs: Sequence[Run], plain: str | None) -> list[Run]:
    """Return the runs that gains are over: plain students, or those of the method ``plain``.

    Raises:
        ConfigError: no run is of that method.
    """
    found = [run for run in runs if (run.role == "plain" if plain is None else run.method == plain)]
    if plain is not None and not found:
        known = ", ".join(dict.fromkeys(run.method for run in runs))
        raise ConfigError(f"--plain: no run is of the method '{plain}'. The methods are: {known}.")
    return found


def pair(runs: Sequence[Run], plain: Sequence[Run]) -> tuple[Partners, list[str]]:
    """Return the plain run beside each run of the same seed, labels, steps and frames, and where that is unclear.

    Of several plain methods the one counts whose recipe is the run's own without distillation.
    """
    partners: dict[Path, Run] = {}
    unclear: dict[str, None] = {}
    methods = {run.method for run in plain}
    for run in runs:
        # Teachers stand beside their students for orientation; they are paired only with what --plain names.
        if run.method in methods or (run.role == "teacher" and all(each.role != "teacher" for each in plain)):
            continue
        fitting = [each for each in plain if _paired(each) == _paired(run)]
        if len({each.method for each in fitting}) > 1:
            fitting = [each for each in fitting if not _other_settings(run, each)]
            if len({each.method for each in fitting}) != 1:
                unclear[f"{run.method} fits several plain students: say by --plain which of them gains are over"] = None
                continue
        if fitting:
            partners[run.folder] = fitting[0]
    return partners, list(unclear)


def _paired(run: Run) -> tuple[Any, ...]:
    return run.seed, _labels(run), run.steps, _frames(run)


def _labels(run: Run) -> tuple[str, ...]:
    return tuple(str(getattr(run.recipe.data, key, None)) for key in _LABELS)


def _frames(run: Run) -> str:
    """Return which frames a run was scored on, as far as its recipe and its result say."""
    settings, metrics = run.settings, run.metrics or {}
    named = {key: settings.get(f"evaluation.data.{key}") for key in _FRAMES}
    reach = settings.get("evaluation.max_distance_m")
    count = metrics.get("frames", metrics.get("images"))
    return f"{count} of {named['name']} {named['version']} {named['split']}" + "".join(
        f", {key} {value}"
        for key, value in {**named, "max_distance_m": reach}.items()
        if key not in _FRAMES[:3] and value
    )


def _world(run: Run) -> str:
    """Return which data a run learned from; a copy elsewhere cannot be told from another world."""
    data, settings = run.recipe.data, run.settings
    named = " ".join(str(settings.get(f"data.{key}")) for key in _FRAMES[:3])
    root = getattr(data, "root", None)
    return f"{named} in {Path(root).absolute()}" if root else named


def fairness(runs: Sequence[Run], partners: Partners) -> list[str]:
    """Return what differs between runs that must be equal for a fair comparison; teachers may differ in training."""
    students = [run for run in runs if run.role != "teacher"]
    found = [
        *_differing("the frames of the evaluation", runs, _frames),
        *_differing("the training data", students, _world),
        *_differing("the labels", students, lambda run: str(run.labels)),
        *_differing("the steps", students, lambda run: str(run.steps)),
        *_differing_beyond_distillation(runs, partners),
    ]
    seen: dict[tuple[str, int], int] = {}
    for run in runs:
        seen[run.method, run.seed] = seen.get((run.method, run.seed), 0) + 1
    found += [
        f"{method}: {count} runs of seed {seed}, which are no independent samples"
        for (method, seed), count in seen.items()
        if count > 1
    ]
    return found


def _differing(what: str, runs: Sequence[Run], value_of: Callable[[Run], str]) -> list[str]:
    methods: dict[str, dict[str, None]] = {}
    for run in runs:
        methods.setdefault(value_of(run), {})[run.method] = None
    if len(methods) < 2:
        return []
    listed = "; ".join(f"{value} ({', '.join(names)})" for value, names in methods.items())
    return [f"{what} differ: {listed}"]


def _differing_beyond_distillation(runs: Sequence[Run], partners: Partners) -> list[str]:
    found: dict[str, None] = {}
    for run in runs:
        if run.folder in partners and (keys := _other_settings(run, partners[run.folder])):
            shown = [*keys[:_SHOWN], *(["..."] if len(keys) > _SHOWN else [])]
            name = partners[run.folder].method
            found[f"{run.method} and {name} differ in more than distillation: {', '.join(shown)}"] = None
    return list(found)


def _other_settings(run: Run, plain: Run) -> list[str]:
    """Return the settings beside distillation and evaluation in which a run is not the plain one."""
    keys = dict.fromkeys([*run.settings, *plain.settings])
    apart = ("distill", "evaluation")
    return [
        key for key in keys if key.partition(".")[0] not in apart and run.settings.get(key) != plain.settings.get(key)
    ]
