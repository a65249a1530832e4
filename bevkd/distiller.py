"""Distillation for training loops that are not bevkd's: caches, losses and adapters behind one module.

A loop brings a model of its own. Its maps have to follow the conventions of ``docs/concepts.md``; what a model lacks is
left out, as long as no loss reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bevkd.cache.reader import CacheReader
from bevkd.config import StrictModel, parse, plugin
from bevkd.data.collate import Batch, StoredSignals
from bevkd.distill.base import (
    DistillContext,
    DistillLoss,
    DistillLossConfig,
    TeacherBatch,
    build_losses,
    loss_labels,
    signals_of,
)
from bevkd.errors import ContractError, report
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads import center
from bevkd.types import Boxes


class _Losses(StrictModel):
    losses: tuple[plugin("bevkd.distill"), ...]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Stored:
    """What losses read of each frame, for a data set's ``__getitem__``; small to pickle into loader processes.

    Attributes:
        caches: reader and the signals that are read, by cache name.
    """

    caches: Mapping[str, tuple[CacheReader, tuple[str, ...]]]

    def __call__(self, token: str) -> dict[str, dict[str, Tensor]]:
        """Return the encoded arrays of a frame by cache name; torch's default collation makes a batch of them.

        Raises:
            CacheError: a cache does not hold the frame, or is damaged.
        """
        return {name: reader.tensors(token, signals) for name, (reader, signals) in self.caches.items()}


@dataclass(frozen=True)
class _Part:
    """An encoder of somebody's model, as far as losses ask about it."""

    stage: str
    channels: Mapping[str, int]

    @property
    def out_channels(self) -> int:
        """Channels of the map.

        Raises:
            ContractError: nobody said how many.
        """
        if self.stage not in self.channels:
            raise ContractError(f"a loss compares {self.stage}: give channels={{'{self.stage}': ...}} of the student.")
        return self.channels[self.stage]


@dataclass(frozen=True)
class _Grid:
    grid: BEVGrid


@dataclass(frozen=True)
class OwnStudent:
    """What stands for the detector in a ``DistillContext``: no part of it computes, but the head draws targets."""

    config: _Grid
    encoder: _Part
    bev_encoder: _Part
    head: center.CenterHead


@dataclass(frozen=True)
class _HeadMaps:
    heatmap: Tensor
    box_code: Tensor


class Distiller(nn.Module):
    """Losses that compare a model's maps with what caches hold, and their adapters.

    ``parameters()`` are those of the adapters; they train with the model and are not needed afterwards.

    Attributes:
        stored: reads what the losses need of a frame.
    """

    def __init__(
        self,
        stored: Stored,
        losses: Sequence[tuple[str, str, DistillLoss]],
        configs: Mapping[str, DistillLossConfig],
        grid: BEVGrid,
        shapes: _Shapes,
    ) -> None:
        super().__init__()
        self.stored, self.grid, self._shapes, self._configs = stored, grid, shapes, dict(configs)
        self._losses = list(losses)
        self.adapters = nn.ModuleList(loss for _, _, loss in losses if isinstance(loss, nn.Module))

    @classmethod
    def open(
        cls,
        caches: Mapping[str, str],
        losses: Sequence[Mapping[str, Any]],
        *,
        grid: BEVGrid,
        classes: Sequence[str],
        tasks: Sequence[Sequence[str]] | None = None,
        channels: Mapping[str, int] | None = None,
        tokens: Sequence[str] | None = None,
        head: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the distiller of a model, with every contract between it, caches and losses checked.

        Args:
            caches: URI of each cache, by the name that losses call it.
            losses: as in a recipe's ``distill.losses``; ``teacher`` names the cache, which may be left out if there is
                one only.
            grid: of the model's maps, equal to that of the caches.
            classes: in the order of the heatmap's channels, equal to that of the caches.
            tasks: classes of each task of the head, each of which has its box code; None is one task.
            channels: of the model's ``bev_low`` and ``bev_high``, as far as losses compare them.
            tokens: frames of the training, of which every one must be cached; None is not checked.
            head: further settings of bevkd's head ``center``, by which losses turn teacher boxes into targets:
                ``min_overlap``, ``min_radius``, ``code_weights``.

        Raises:
            ContractError: lists everything that does not fit.
            ConfigError: a loss is unknown, or its settings are wrong.
            CacheError: there is no cache at one of the addresses.
        """
        only = {"teacher": next(iter(caches))} if len(caches) == 1 else {}
        wanted = parse(_Losses, {"losses": [{**only, **loss} for loss in losses]}, "Distiller.open(losses=...)").losses
        readers = {name: CacheReader.open(uri) for name, uri in caches.items()}
        settings = {**(head or {}), "tasks": [list(task) for task in tasks or [classes]]}
        targets = center.build(
            parse(center.Config, settings, "Distiller.open(head=..., tasks=...)"), 1, grid, tuple(classes)
        )
        known = channels or {}
        student = OwnStudent(_Grid(grid), _Part("bev_low", known), _Part("bev_high", known), targets)
        faults: list[str] = []
        for loss in wanted:
            faults += [f"loss '{loss.name}': {fault}" for fault in _faults(loss, readers, student, classes, tokens)]
        if faults:
            raise report(ContractError, "this model cannot be distilled as asked:", list(dict.fromkeys(faults)))
        manifests = {name: reader.manifest for name, reader in readers.items()}
        built = build_losses(
            wanted,
            student,
            {name: each.sample_shapes for name, each in manifests.items()},
            {name: each.statistics for name, each in manifests.items()},
        )
        stored = Stored({name: (readers[name], read) for name, read in signals_of(wanted).items()})
        shapes = _Shapes(grid.shape, len(classes), len(targets.labels_of_task), dict(known))
        return cls(stored, built, dict(zip(loss_labels(wanted), wanted, strict=True)), grid, shapes)

    def __contains__(self, token: str) -> bool:
        """Return whether every cache holds the frame."""
        return all(token in reader for reader, _ in self.stored.caches.values())

    def forward(
        self,
        stored: Mapping[str, StoredSignals],
        *,
        tokens: Sequence[str],
        boxes: Sequence[Boxes],
        labelled: Bool[Tensor, "B"] | None = None,
        bev_low: Float[Tensor, "B C Y X"] | None = None,
        bev_high: Float[Tensor, "B D Y X"] | None = None,
        heatmap: Float[Tensor, "B K Y X"] | None = None,
        box_code: Float[Tensor, "B T 10 Y X"] | None = None,
        bev_affines: Sequence[BEVAffine] | Float[Tensor, "B n n"] | None = None,
        progress: float | None = None,
    ) -> dict[str, Tensor]:
        """Return every weighted term by name; their sum joins the model's own loss.

        Args:
            stored: what :attr:`stored` gave of each frame, collated; it is brought to the maps' device.
            tokens: of the frames, for messages.
            boxes: annotations of each frame, with the BEV augmentation in them; empty where there are none.
            labelled: which frames have annotations; None is all.
            bev_low, bev_high: the model's maps before and after its BEV encoder.
            heatmap: class logits in the order of ``classes``.
            box_code: see ``bevkd.types.Signals``.
            bev_affines: ``augmented_from_canonical`` of each frame, see ``BEVAffine.from_matrix``; None is no
                augmentation.
            progress: share of the run that is done, from 0 to 1, which losses with a ``schedule`` need.

        Raises:
            ContractError: a loss reads a map that was not given, or an augmentation that maps cannot follow, or has a
                schedule and is not told the progress.
        """
        scheduled = [label for label, config in self._configs.items() if config.schedule]
        if scheduled and (progress is None or not 0 <= progress <= 1):
            raise ContractError(
                f"{', '.join(scheduled)} has a schedule: give progress=step / steps, the share of the run that is done "
                f"(from 0 to 1, not {progress}), or drop the schedule."
            )
        maps = {"bev_low": bev_low, "bev_high": bev_high, "heatmap": heatmap, "box_code": box_code}
        given = [each for each in maps.values() if each is not None]
        if not given:
            raise ContractError("give at least one map of the model: bev_low, bev_high, heatmap or box_code.")
        device = given[0].device
        full = {
            name: self._shapes.placeholder(name, len(tokens), device) if each is None else each
            for name, each in maps.items()
        }
        output = DetectorOutput(full["bev_low"], full["bev_high"], _HeadMaps(full["heatmap"], full["box_code"]))
        affines = _affines(bev_affines, len(tokens))
        batch = Batch(
            tokens=tuple(tokens),
            boxes=tuple(each.to(device) for each in boxes),
            labelled=torch.ones(len(tokens), dtype=torch.bool, device=device)
            if labelled is None
            else labelled.to(device),
            affines=affines,
        )
        terms: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            teachers = {name: self._decoded(name, stored[name], affines, device) for name in self.stored.caches}
            for label, cache, loss in self._losses:
                config = self._configs[label]
                terms |= {
                    f"{label}/{name}": term * config.factor_of(name, progress or 0.0) if config.schedule else term
                    for name, term in loss(output, teachers[cache], batch).items()
                }
        if len(given) < len(maps) and (unknown := [name for name, term in terms.items() if bool(term.isnan())]):
            absent = ", ".join(name for name, each in maps.items() if each is None)
            raise ContractError(
                f"{', '.join(unknown)} cannot be told without {absent}. Pass these maps, or drop the loss."
            )
        return terms

    def _decoded(
        self, name: str, arrays: StoredSignals, affines: tuple[BEVAffine, ...], device: torch.device
    ) -> TeacherBatch:
        here = {key: array.to(device, non_blocking=True) for key, array in arrays.items()}
        return TeacherBatch.decode(self.stored.caches[name][0].manifest.spec, here, affines, self.grid)


@dataclass(frozen=True)
class _Shapes:
    """Shapes of the maps of a model."""

    grid: tuple[int, int]
    classes: int
    tasks: int
    channels: Mapping[str, int]

    def placeholder(self, name: str, frames: int, device: torch.device) -> Tensor:
        """Return NaN in the shape of a map that was not given, which shows in whatever reads it; takes no memory."""
        leading = {"heatmap": (self.classes,), "box_code": (self.tasks, center.CODE_SIZE)}
        shape = (frames, *leading.get(name, (self.channels.get(name, 1),)), *self.grid)
        return torch.full((1,) * len(shape), torch.nan, device=device).expand(shape)


def _affines(given: Sequence[BEVAffine] | Tensor | None, frames: int) -> tuple[BEVAffine, ...]:
    if given is None:
        return (BEVAffine.identity(),) * frames
    if isinstance(given, Tensor):
        return tuple(BEVAffine.from_matrix(matrix) for matrix in given.detach().cpu())
    return tuple(given)


def _faults(
    loss: DistillLossConfig,
    readers: Mapping[str, CacheReader],
    student: OwnStudent,
    classes: Sequence[str],
    tokens: Sequence[str] | None,
) -> list[str]:
    """Return everything in which a loss does not fit its cache and the model."""
    if loss.teacher not in readers:
        return [f"it reads the cache '{loss.teacher}', given are: {', '.join(readers) or 'none'}"]
    reader = readers[loss.teacher]
    faults = reader.require(loss.signals(), student.config.grid, tokens, classes)
    if faults:
        return faults
    try:
        return loss.misfits(DistillContext(student, reader.manifest.sample_shapes, reader.manifest.statistics))
    except ContractError as error:
        return [str(error)]
