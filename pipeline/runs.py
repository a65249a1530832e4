"""Finished runs as comparison and report read them: what was trained, how, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bevkd.cache.reader import CacheReader
from bevkd.config import digest, parse, read_yaml
from bevkd.distill.base import signals_of
from bevkd.errors import BevkdError, ConfigError, report
from bevkd.training.tracking import read_log
from pipeline.parts import MAY_DIFFER
from pipeline.recipe import SegmenterRecipe, StudentRecipe
from pipeline.terms import active_terms, terms_text

Role = Literal["plain", "distilled", "teacher"]

_SEEDS = ("training.seed", "data.labels_seed")
_SHOWN, _BRIEF = 3, 24

_Sizes = dict[tuple[str, tuple[str, ...]], tuple[str | None, float | None]]
"""What is known of caches by address and signals: digest and bytes per frame."""


@dataclass(frozen=True)
class UsedCache:
    """A cache that a distilled run read.

    Attributes:
        name: as its losses call it.
        digest: what the cache called itself, None if neither the run nor the cache can say.
        signals: what the losses read of it.
        bytes_per_frame: that these signals take in it, None if it cannot be opened from here.
    """

    name: str
    uri: str
    digest: str | None
    signals: tuple[str, ...]
    bytes_per_frame: float | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        recipe: as resolved; of ``train-teacher`` too.
        role: ``plain`` and ``distilled`` are runs of ``train-student``, ``teacher`` those of ``train-teacher``.
        method: a label for people, the same for all seeds and for no other method of the runs read together.
        group: digest of what all seeds of a method share: the recipe without seeds and places, and the caches.
        settings: the recipe's values by their path, e.g. ``training.steps``, without seeds and places.
        result: content of ``result.json``.
        caches: that its losses read.
    """

    folder: Path
    recipe: StudentRecipe | SegmenterRecipe
    role: Role
    method: str
    group: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    caches: tuple[UsedCache, ...]

    @property
    def seed(self) -> int:
        """Seed of weights and order of frames."""
        return self.recipe.training.seed

    @property
    def labels(self) -> Any:
        """Which frames kept their labels: a share of them, names of scenes, or a file."""
        labels = getattr(self.recipe.data, "labels", 1.0)
        return str(labels) if isinstance(labels, Path) else labels

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.result["steps"])

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step."""
        return float(self.result["step_seconds"])

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory that was in use."""
        return int(self.result["peak_memory_bytes"])

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The report of the data set's metrics as its ``to_json`` gives it, None if the recipe has no evaluation."""
        metrics: Mapping[str, Any] | None = self.result["metrics"]
        return metrics

    @property
    def cache_bytes_per_frame(self) -> float | None:
        """Bytes per frame that the losses read of all caches, None if one of them cannot say."""
        sizes = [cache.bytes_per_frame for cache in self.caches]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    @property
    def detections(self) -> Path | None:
        """File or folder of the detections of the evaluation at the end, None if there are none."""
        places = (self.folder / "detections.json", self.folder / "detections")
        return next((place for place in places if place.exists()), None)

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of ``log.jsonl``."""
        return read_log(self.folder)


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Return the run folders among ``places`` and below them, each once, in the order given and by name.

    Raises:
        ConfigError: names every place that is no run and holds none.
    """
    found: dict[Path, None] = {}
    empty = []
    for place in places:
        # A path with a recipe inside a run is none: runs do not hold runs.
        runs = [place] if (place / "recipe.yaml").is_file() else sorted(each.parent for each in _recipes(place))
        found |= dict.fromkeys(runs)
        empty += [] if runs else [f"{place}: {'no run in it' if place.is_dir() else 'no such folder'}"]
    if empty:
        raise report(
            ConfigError, "give folders of train-teacher or train-student, or folders that hold such runs:", empty
        )
    return list(found)


def _recipes(place: Path) -> list[Path]:
    paths = place.rglob("recipe.yaml")
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(place).parts)]


def read_runs(places: Sequence[Path], skip_unfinished: bool = False) -> list[Run]:
    """Return the finished runs among ``places`` and below them, their methods labelled apart.

    Args:
        skip_unfinished: leave out runs without ``result.json`` instead of refusing them.

    Raises:
        ConfigError: a place holds no run, a recipe cannot be read, or runs are unfinished; names all of those.
    """
    folders = find_runs(places)
    unfinished = [folder for folder in folders if not (folder / "result.json").is_file()]
    if unfinished and (not skip_unfinished or len(unfinished) == len(folders)):
        advice = "Finish them with --resume, or leave them out"
        raise report(
            ConfigError, f"runs that are not finished, which have no result.json. {advice}:", [*map(str, unfinished)]
        )
    sizes: _Sizes = {}
    return labelled_apart([_read(folder, sizes) for folder in folders if folder not in unfinished])


def _read(folder: Path, sizes: _Sizes) -> Run:
    where = folder / "recipe.yaml"
    values = read_yaml(where)
    recipe: StudentRecipe | SegmenterRecipe
    recipe = (
        parse(SegmenterRecipe, values, str(where))
        if "segmenter" in values
        else parse(StudentRecipe, values, str(where))
    )
    distilled = isinstance(recipe, StudentRecipe) and recipe.distill is not None
    role: Role = "distilled" if distilled else "plain" if "distill" in values else "teacher"
    caches = _caches(folder, recipe, sizes) if isinstance(recipe, StudentRecipe) else ()
    settings = _settings(recipe, caches)
    group = digest({"role": role, **settings})
    return Run(folder, recipe, role, method_of(recipe, role), group, settings, _result(folder), caches)


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    try:
        result = json.loads(path.read_bytes())
        missing = [key for key in ("steps", "step_seconds", "peak_memory_bytes", "metrics") if key not in result]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no JSON of a run: {error}. Write it again with --resume.") from error
    if missing:
        raise ConfigError(f"{path} has no {', '.join(missing)}: it is not that of a run. Leave {folder} out.")
    return dict(result)


def method_of(recipe: StudentRecipe | SegmenterRecipe, role: Role) -> str:
    """Return a label of what was trained: ``plain``, the terms of the losses, or ``teacher`` and its encoder."""
    if isinstance(recipe, SegmenterRecipe):
        return "teacher (segmenter)"
    if role == "teacher":
        return f"teacher ({recipe.detector.encoder.name})"
    losses = recipe.distill.losses if recipe.distill else ()
    return terms_text(losses, active_terms(losses)) or "plain"


def labelled_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with the labels of different methods different: what tells their recipes apart is added."""
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        groups.setdefault(run.method, {}).setdefault(run.group, run)
    labels: dict[str, str] = {}
    for method, same in groups.items():
        taken: dict[str, int] = {}
        for group, run in same.items():
            label = f"{method} ({_difference(run, list(same.values()))})" if len(same) > 1 else method
            again = taken[label] = taken.get(label, 0) + 1
            labels[group] = f"{label} #{again}" if again > 1 else label
    return [replace(run, method=labels[run.group]) for run in runs]


def _difference(run: Run, others: Sequence[Run]) -> str:
    """Return the settings that tell a run from others, the first few of them."""
    keys = dict.fromkeys(key for other in others for key in other.settings)
    differing = [key for key in keys if len({repr(other.settings.get(key)) for other in others}) > 1]
    leaves = [key.rpartition(".")[2] for key in differing]
    shown = [
        f"{leaf if leaves.count(leaf) == 1 else key} {_brief(run.settings.get(key))}"
        for key, leaf in zip(differing, leaves, strict=True)
    ]
    return ", ".join(shown[:_SHOWN] + (["..."] if len(shown) > _SHOWN else []))


def _brief(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 3]}..."


def _settings(recipe: StudentRecipe | SegmenterRecipe, caches: Sequence[UsedCache]) -> dict[str, Any]:
    # Where the weights come from that a student starts with is part of its method, though a resumed run may move it.
    places = MAY_DIFFER - {"initial.run"}
    values = {key: value for key, value in flat(recipe.model_dump(mode="json")) if key not in (*places, *_SEEDS)}
    return values | {f"distill.caches.{cache.name}": cache.digest or cache.uri for cache in caches}


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings and lists of mappings, each with its path, e.g. ``distill.losses.0.name``."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for index, value in enumerate(values):
            yield from flat(value, f"{path}.{index}")
    else:
        yield path, values


def _caches(folder: Path, recipe: StudentRecipe, sizes: _Sizes) -> tuple[UsedCache, ...]:
    distill = recipe.distill
    if distill is None or distill.teacher == "online":
        return ()
    recorded = _recorded(folder)
    found = []
    for name, signals in signals_of(distill.losses).items():
        if uri := distill.caches.get(name):
            if (uri, signals) not in sizes:
                sizes[uri, signals] = _opened(uri, signals)
            present, size = sizes[uri, signals]
            own = recorded.get(name, present)
            # Another cache may have taken its place since.
            found.append(UsedCache(name, uri, own, signals, size if present == own else None))
    return tuple(found)


def _recorded(folder: Path) -> dict[str, str]:
    """Return the digest of each cache by its name, as the newest checkpoint of a run has them."""
    for path in sorted(folder.glob("checkpoints/step_*/checkpoint.json"), reverse=True):
        try:
            return dict(json.loads(path.read_bytes()).get("caches", {}))
        except (OSError, ValueError):
            continue
    return {}


def _opened(uri: str, signals: tuple[str, ...]) -> tuple[str | None, float | None]:
    """Return the digest of a cache and the bytes per frame of ``signals``, None if it cannot be opened from here."""
    try:
        reader = CacheReader.open(uri)
        return reader.manifest.name, reader.read_bytes(signals) / len(reader.frames)
    except (BevkdError, OSError):
        return None, None
