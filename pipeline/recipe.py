"""Recipes: one complete YAML file per run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from bevkd import config
from bevkd.config import PluginConfig, StrictModel, plugin
from bevkd.data.augment import AugmentConfig, ImageAugment
from bevkd.data.instances import InstanceDataConfig
from bevkd.distill.base import DistillLossConfig
from bevkd.errors import ConfigError
from bevkd.models.detector import DetectorConfig
from bevkd.models.segmenter import SegmenterConfig
from bevkd.training.config import BalanceConfig, TrainingConfig

Source = plugin("bevkd.data.sources")
_FOLDER = Path(str(resources.files("pipeline"))) / "recipes"


class EvaluationConfig(StrictModel):
    """What the metrics are computed on.

    Attributes:
        data: frames to evaluate on; they always have all their labels.
        max_distance_m: score boxes this near to the ego only, e.g. those inside the grid; None is the benchmark.
        batch_size: frames per process and forward pass.
        workers: loader processes; 0 loads in the predicting process.
        frames: of the evaluations in the loop, evenly spaced; None takes all, as the evaluation at the end always does.
    """

    data: Source  # type: ignore[valid-type]
    max_distance_m: float | None = Field(None, gt=0)
    batch_size: int = Field(4, gt=0)
    workers: int = Field(2, ge=0)
    frames: int | None = Field(None, gt=0)


class InitialConfig(StrictModel):
    """An earlier run whose weights a detector starts from.

    Channels of a narrower detector take over evenly spread ones of the wider. What fits not stays random, and is named.

    Attributes:
        run: folder of ``train-teacher`` or ``train-student``.
        parts: which parts of the detector.
    """

    run: Path
    parts: tuple[Literal["encoder", "bev_encoder", "head"], ...] = Field(
        default=("encoder", "bev_encoder", "head"), min_length=1
    )


class TrainRecipe(StrictModel):
    """Of ``train-teacher``, and the common part of ``train-student``.

    Attributes:
        data: frames to train on; ``data.labels`` hides the labels of the others.
        evaluation: None skips the evaluation at the end.
        initial: None starts from random weights, beside those of ``backbone.weights``.
        device: e.g. ``cpu`` or ``cuda``; None takes a GPU if there is one.
    """

    data: Source  # type: ignore[valid-type]
    evaluation: EvaluationConfig | None = None
    detector: DetectorConfig
    initial: InitialConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig
    device: str | None = None


class SegmenterEvaluation(StrictModel):
    """Which images the mask metrics are computed on."""

    data: InstanceDataConfig
    batch_size: int = Field(4, gt=0)


class SegmenterRecipe(StrictModel):
    """Of ``train-teacher`` for a segmenter: what tells it from a detector's recipe is the key ``segmenter``.

    Attributes:
        data: images to train on.
        evaluation: None skips the evaluation at the end.
        device: e.g. ``cpu`` or ``cuda``; None takes a GPU if there is one.
    """

    data: InstanceDataConfig
    evaluation: SegmenterEvaluation | None = None
    segmenter: SegmenterConfig
    augment: ImageAugment = ImageAugment()
    training: TrainingConfig
    device: str | None = None


class LocalCopyConfig(StrictModel):
    """Where whole blocks of remote caches are kept on this machine. Caches on disk are read where they are.

    Attributes:
        folder: None takes ``$BEVKD_LOCAL_COPY``, or bevkd's folder in the user's cache folder.
        max_gb: most that it may hold, for all runs that share it. If the arrays that a run reads are larger, its frames
            are shuffled block by block, so that each block is fetched once per epoch.
    """

    folder: Path | None = None
    max_gb: float = Field(100.0, gt=0)


class DistillConfig(StrictModel):
    """Where the teachers' knowledge comes from, and how it is used.

    Attributes:
        teacher: ``cached`` reads caches and has no teacher in memory; ``online`` runs the teachers within each step
            instead, on the augmented batch, to compare: the same losses on the same frames, at the cost of the teacher.
        caches: URI of each cache, by the name that losses call it.
        online: instead of them, ``cache-teacher`` recipe of each teacher by that name: its ``teacher`` and ``spec``
            count, its frames are not read.
        local_copy: for caches in object stores.
        losses: plug-ins of ``bevkd.distill``.
        balance: holds each of their terms between 0.1 and 1 times the detection loss, or other bounds; None leaves them
            as they are weighted.
        frames: ``all`` trains on every frame of ``data``, labelled or not; ``labelled`` on labelled ones only.
    """

    teacher: Literal["cached", "online"] = "cached"
    caches: dict[str, str] = Field(default={})
    online: dict[str, str] = Field(default={})
    local_copy: LocalCopyConfig = LocalCopyConfig()
    losses: tuple[plugin("bevkd.distill"), ...] = ()  # type: ignore[valid-type]
    balance: BalanceConfig | None = None
    frames: Literal["all", "labelled"] = "all"

    @field_validator("losses")
    @classmethod
    def _check_losses(cls, losses: tuple[PluginConfig, ...]) -> tuple[PluginConfig, ...]:
        for loss in losses:
            if not isinstance(loss, DistillLossConfig):
                raise ValueError(
                    f"the Config of loss '{loss.name}' must derive from bevkd.distill.base.DistillLossConfig"
                )
        return losses


class StudentRecipe(TrainRecipe):
    """Of ``train-student``; without ``distill`` it is a plain run."""

    distill: DistillConfig | None = None


class CacheRecipe(StrictModel):
    """Of ``cache-teacher``.

    Attributes:
        teacher: a plug-in of ``bevkd.teachers``.
        spec: name of a file in ``cache_specs/`` or the path of one.
        variants: hold each frame also as the teacher sees it flipped (``flips``), or flipped and turned by quarters
            (``d4``), as far as the grid maps onto itself: up to 4 or 8 times the space, and no error from warping.
        batch_size: frames that the teacher sees at once; a batch never spans two blocks.
        loaders: processes that load frames ahead of one teacher, at most one per core; 0 loads between its batches.
        licence: what users of the cache must know, e.g. the licence of data and weights.
        device: e.g. ``cpu`` or ``cuda``; None takes a GPU if there is one.
    """

    data: Source  # type: ignore[valid-type]
    teacher: plugin("bevkd.teachers")  # type: ignore[valid-type]
    spec: str
    variants: Literal["none", "flips", "d4"] = "none"
    batch_size: int = Field(1, gt=0)
    loaders: int = Field(2, ge=0)
    licence: str = ""
    device: str | None = None


class EvaluateRecipe(StrictModel):
    """Of ``evaluate``: which frames a cache's or a file's boxes are compared with."""

    data: Source  # type: ignore[valid-type]


def find(recipe: str) -> Path:
    """Return the path of a recipe given as a path or as the name of one that ships with bevkd.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    if recipe not in shipped():
        raise ConfigError(f"no recipe '{recipe}'. Give the path of a .yaml file, or one of: {', '.join(shipped())}.")
    return _FOLDER / f"{recipe}.yaml"


def shipped() -> list[str]:
    """Return the names of the recipes that ship with bevkd."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_train(recipe: str, overrides: Sequence[str]) -> TrainRecipe:
    """Return a ``train-teacher`` recipe of a detector with overrides applied."""
    return config.load(TrainRecipe, find(recipe), overrides)


def load_teacher(recipe: str, overrides: Sequence[str]) -> TrainRecipe | SegmenterRecipe:
    """Return a ``train-teacher`` recipe with overrides applied: of a segmenter if it has the key ``segmenter``."""
    path = find(recipe)
    values = config.apply_overrides(config.read_yaml(path), overrides)
    if "segmenter" in values:
        return config.parse(SegmenterRecipe, values, str(path))
    return config.parse(TrainRecipe, values, str(path))


def load_student(recipe: str, overrides: Sequence[str]) -> StudentRecipe:
    """Return a ``train-student`` recipe with overrides applied."""
    return config.load(StudentRecipe, find(recipe), overrides)


def load_cache(recipe: str, overrides: Sequence[str]) -> CacheRecipe:
    """Return a ``cache-teacher`` recipe with overrides applied."""
    return config.load(CacheRecipe, find(recipe), overrides)
