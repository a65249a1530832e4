"""How far a warped cached map is from the teacher run on the augmented input, by kind of augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bevkd.data.augment import AugmentConfig, apply_affine
from bevkd.data.collate import Batch, Sample, collate
from bevkd.data.join import FrameDataset
from bevkd.data.sampler import mix
from bevkd.distill.base import TeacherBatch, sample_at
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.sampling import foreground_cells
from bevkd.grid import BEVGrid
from bevkd.progress import Progress
from bevkd.signals import MAPS, POINTS
from bevkd.types import Boxes, Signals
from pipeline.cache_teacher import Stage, prepare
from pipeline.parts import check_files
from pipeline.recipe import CacheRecipe

if TYPE_CHECKING:
    from rich.table import Table

SCORE = 0.1
"""The teacher's boxes above it count as peaks."""

MATCH_M = 2.0
"""Boxes of the same class whose centres are nearer than this are the same object."""

_QUARTER = math.pi / 2
_FIXED: Mapping[str, tuple[BEVAffine, ...]] = {
    "flip x": (BEVAffine(flip_x=True),),
    "flip y": (BEVAffine(flip_y=True),),
    "quarter turns": tuple(BEVAffine(rotation_rad=turns * _QUARTER) for turns in (1, 2, 3)),
    "turn 22.5°": tuple(BEVAffine(rotation_rad=sign * _QUARTER / 4) for sign in (1, -1)),
    "scale 0.95 / 1.05": (BEVAffine(scale=0.95), BEVAffine(scale=1.05)),
    "shift 0.5 m": (BEVAffine(translation_m=(0.5, 0.0, 0.0)), BEVAffine(translation_m=(0.0, -0.5, 0.0))),
}
_DRAWN = ("bevdepth", "unidistill")
_DRAWS = 2


@dataclass
class Difference:
    """Sums over everything that was compared: of squares of the difference, of both, and of their product."""

    error2: float = 0.0
    warped2: float = 0.0
    exact2: float = 0.0
    product: float = 0.0

    def add(self, warped: Tensor, exact: Tensor) -> None:
        """Count the values of one more frame."""
        warped, exact = warped.double().flatten(), exact.double().flatten()
        self.error2 += float((warped - exact) @ (warped - exact))
        self.warped2 += float(warped @ warped)
        self.exact2 += float(exact @ exact)
        self.product += float(warped @ exact)

    @property
    def error(self) -> float | None:
        """Norm of the difference over the norm of what the teacher says; None if it says nothing."""
        return math.sqrt(self.error2 / self.exact2) if self.exact2 > 0 else None

    @property
    def cosine(self) -> float | None:
        """Cosine similarity; None if the teacher says nothing."""
        norm = math.sqrt(self.warped2) * math.sqrt(self.exact2)
        return self.product / norm if norm > 0 else None


@dataclass
class Peaks:
    """The teacher's boxes: how many there are, how many have a counterpart, and how far away those are in all."""

    boxes: int = 0
    matched: int = 0
    distance_m: float = 0.0

    def add(self, moved: Boxes, exact: Boxes) -> None:
        """Look for a counterpart of each box among the others, both ways."""
        for ours, theirs in ((moved, exact), (exact, moved)):
            distance = torch.cdist(ours.center[:, :2].double(), theirs.center[:, :2].double())
            distance = torch.where(ours.labels[:, None] == theirs.labels, distance, math.inf)
            nearest = distance.amin(dim=1) if len(theirs) else distance.new_full((len(ours),), math.inf)
            near = nearest < MATCH_M
            self.boxes += len(ours)
            self.matched += int(near.sum())
            self.distance_m += float(nearest[near].sum())

    @property
    def agreement(self) -> float | None:
        """Share of boxes with a counterpart; None without boxes."""
        return self.matched / self.boxes if self.boxes else None

    @property
    def shift_m(self) -> float | None:
        """Mean distance of the centres of counterparts; None if there are none."""
        return self.distance_m / self.matched if self.matched else None


@dataclass
class Kind:
    """What one kind of augmentation costs.

    Attributes:
        exact_warp: maps warp without resampling, so that all differences are the teacher's own.
        passes: of the teacher on augmented input.
        everywhere: per map, over all cells that the warped map covers.
        at_objects: per map over cells at objects; per signal of points at the nine points of annotated boxes.
        peaks: the teacher's boxes.
    """

    name: str
    exact_warp: bool = True
    passes: int = 0
    everywhere: dict[str, Difference] = field(default_factory=dict)
    at_objects: dict[str, Difference] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)

    def to_json(self) -> dict[str, Any]:
        """Return the kind as plain values."""
        return {
            "kind": self.name,
            "exact_warp": self.exact_warp,
            "passes": self.passes,
            "everywhere": {name: {"error": d.error, "cosine": d.cosine} for name, d in self.everywhere.items()},
            "at_objects": {name: {"error": d.error, "cosine": d.cosine} for name, d in self.at_objects.items()},
            "boxes": {"agreement": self.peaks.agreement, "shift_m": self.peaks.shift_m, "count": self.peaks.boxes},
        }


@dataclass(frozen=True)
class EquivarianceReport:
    """How equivariant a teacher is, by kind of augmentation."""

    teacher: str
    frames: tuple[str, ...]
    kinds: tuple[Kind, ...]

    @property
    def sentence(self) -> str:
        """The report in one sentence, of the deepest features at objects."""
        names = [name for name in ("bev_high", "bev_low", "heatmap") if name in self.kinds[0].at_objects]
        if not names:
            return "there was no object to look at"
        costs = [(kind, kind.at_objects[names[0]].error) for kind in self.kinds]
        said = ", ".join(f"{kind.name} {_percent(error)}" for kind, error in costs if error is not None)
        return f"at objects, a warped {names[0]} differs from what the teacher says of the augmented frame by: {said}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "teacher": self.teacher,
            "frames": list(self.frames),
            "kinds": [kind.to_json() for kind in self.kinds],
            "sentence": self.sentence,
        }


def equivariance(recipe: CacheRecipe, frames: int, progress: Progress) -> EquivarianceReport:
    """Return how far warped maps of un-augmented frames are from the teacher on augmented ones; writes nothing.

    Args:
        recipe: of the cache: its data and its teacher.
        frames: how many to look at, spread over the data set.

    Raises:
        ConfigError: the teacher writes no BEV map.
    """
    stage = prepare(recipe, None, progress)
    if not set(MAPS) & set(stage.teacher.shapes):
        raise ConfigError(f"the teacher '{stage.teacher.identity.name}' writes no BEV map that a student could warp.")
    tokens = stage.source.tokens
    chosen = tuple(tokens[index * len(tokens) // frames] for index in range(frames)) if frames < len(tokens) else tokens
    check_files(stage.source, chosen, stage.teacher.view.sensors)
    kinds = {name: Kind(name) for name in (*_FIXED, *_DRAWN)}
    passes = sum(len(affines) for affines in _FIXED.values()) + _DRAWS * len(_DRAWN)
    dataset = FrameDataset(stage.source, chosen, stage.teacher.view)
    with progress.task("comparing", len(chosen) * passes, "run") as task:
        for index in range(len(chosen)):
            sample = dataset[index]
            canonical = stage.teacher.infer(collate([sample]))
            for name, affines in {**_FIXED, **_drawn(index)}.items():
                for affine in affines:
                    _compare(stage, sample, canonical, affine, kinds[name])
                    task.advance()
    return EquivarianceReport(stage.teacher.identity.name, chosen, tuple(kinds.values()))


def _drawn(index: int) -> dict[str, list[BEVAffine]]:
    generator = torch.Generator().manual_seed(mix(0, index))
    ranges = {name: AugmentConfig.model_validate(name).bev for name in _DRAWN}
    return {name: [BEVAffine.sample(config, generator) for _ in range(_DRAWS)] for name, config in ranges.items()}


def _compare(stage: Stage, sample: Sample, canonical: Signals, affine: BEVAffine, kind: Kind) -> None:
    """Count the difference of one frame under one augmentation."""
    grid = stage.teacher.grid
    batch = collate([Sample(apply_affine(sample.frame, affine), affine, {})])
    exact = stage.teacher.infer(batch)
    warped = TeacherBatch(canonical, (affine,), grid)
    kind.passes += 1
    kind.exact_warp &= affine.is_grid_exact(grid)
    objects = foreground_cells(_objects(batch, exact), grid)
    for name in MAPS:
        theirs: Tensor | None = getattr(exact, name)
        if theirs is None:
            continue
        ours, covered = warped.warped(name)
        ours, theirs = ours[0].float(), theirs[0].float()
        if name == "heatmap":  # probabilities: logits of the background would outweigh everything
            ours, theirs = ours.sigmoid(), theirs.sigmoid()
        seen = covered[0, 0].to(ours.device)
        at_objects = seen & objects.to(ours.device)
        if name != "box_code":  # which means nothing where there is no object
            kind.everywhere.setdefault(name, Difference()).add(ours[..., seen], theirs[..., seen])
        kind.at_objects.setdefault(name, Difference()).add(ours[..., at_objects], theirs[..., at_objects])
    _compare_points(warped, exact, sample.frame.boxes, kind)
    if canonical.boxes is not None and exact.boxes is not None:
        kind.peaks.add(*(_inside(boxes[0], affine, grid) for boxes in (warped.boxes, exact.boxes)))


def _compare_points(warped: TeacherBatch, exact: Signals, boxes: Boxes | None, kind: Kind) -> None:
    """Count the difference at the nine points of annotated boxes, which need no warp."""
    if boxes is None or not len(boxes):
        return
    for name, source in POINTS.items():
        ours, theirs = getattr(warped.canonical, source), getattr(exact, source)
        if ours is None or theirs is None:
            continue
        points = nine_points(boxes.values[:, :7]).to(ours.device)
        moved = warped.to_augmented(points, 0)
        known = ((warped.grid.to_sampling(moved).abs() < 1) & (warped.grid.to_sampling(points).abs() < 1)).all(dim=-1)
        pair = (sample_at(ours, [points], warped.grid), sample_at(theirs, [moved], warped.grid))
        kind.at_objects.setdefault(name, Difference()).add(*(values[known] for values in pair))


def _objects(batch: Batch, exact: Signals) -> Boxes:
    """Return the annotated boxes of the augmented frame, or the teacher's if there are none."""
    if len(batch.boxes[0]) or exact.boxes is None:
        return batch.boxes[0]
    found = exact.boxes[0].to("cpu")
    return found[found.scores >= SCORE]


def _inside(boxes: Boxes, affine: BEVAffine, grid: BEVGrid) -> Boxes:
    """Return the confident boxes, in the augmented frame, that lie on the grid before and after augmentation."""
    boxes = boxes.to("cpu")
    before = affine.inverse().apply_to_points(boxes.center)
    on_grid = [(grid.to_sampling(xyz[:, :2]).abs() <= 1).all(dim=1) for xyz in (boxes.center, before)]
    return boxes[(boxes.scores >= SCORE) & on_grid[0] & on_grid[1]]


def equivariance_table(report: EquivarianceReport) -> Table:
    """Return the report as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    signals = list(report.kinds[0].at_objects)
    table = Table(
        title=f"teacher {report.teacher}, {len(report.frames)} frames",
        caption="relative error of a warped map beside the teacher on the augmented frame, at objects; of the boxes "
        f"above {SCORE:g} those found again within {MATCH_M:g} m, and how far away. * maps are resampled",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("augmentation")
    for heading in (*signals, "boxes", "shift m"):
        table.add_column(heading.replace("_", " "), justify="right")
    for kind in report.kinds:
        shares = [*(kind.at_objects[name].error for name in signals), kind.peaks.agreement]
        shift = "-" if kind.peaks.shift_m is None else f"{kind.peaks.shift_m:.2f}"
        table.add_row(kind.name + ("" if kind.exact_warp else " *"), *map(_percent, shares), shift)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
