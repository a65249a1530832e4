"""What a cache spec has to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bevkd.cache.manifest import Header, TeacherIdentity
from bevkd.cache.reader import CacheReader
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec
from bevkd.cache.writer import CacheWriter
from bevkd.config import parse
from bevkd.data.join import View
from bevkd.grid import BEVGrid
from bevkd.signals import MAPS, POINTS
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of, same_boxes
from bevkd.types import Boxes, BoxPoints, Instances, Signals, SparseMap

CLASSES = ("car", "truck", "pedestrian")
FRAMES = 5
_LOGITS = -6.0


class CacheSpecTests:
    """Subclass it and define :meth:`spec`."""

    grid = BEVGrid(x_m=(-12.8, 12.8), y_m=(-9.6, 9.6), cell_m=0.8)

    def spec(self) -> CacheSpec:
        """Return the spec."""
        raise NotImplementedError("define spec()")

    def _write(self, folder: Path, spec: CacheSpec) -> tuple[CacheReader, Signals, MadeUpFrames]:
        """Return a cache of made-up signals, and what went into it."""
        source = MadeUpFrames(CLASSES, self.grid, FRAMES)
        signals = _signals(source)
        annotated = [source.annotations(token) if token in source.labelled else None for token in source.tokens]
        shapes = {name: tuple(getattr(signals, name).shape[1:]) for name in MAPS} | {"instances": ()}
        header = Header(
            spec=spec,
            teacher=TeacherIdentity(name="made-up", architecture={}, weights_sha256="0" * 64),
            dataset=source.identity,
            grid=self.grid,
            classes=CLASSES,
            tokens=source.tokens,
        )
        writer = CacheWriter.open(folder / "cache", header, shapes)
        for block in writer.pending():
            frames = [source.tokens.index(token) for token in writer.header.block_tokens(block)]
            writer.write_block(block, [stored_signals(signals, annotated, spec, self.grid, frame) for frame in frames])
        writer.seal()
        return CacheReader.open(folder / "cache"), signals, source

    def test_it_is_what_its_text_says(self) -> None:
        """Writing it out and reading it again changes nothing."""
        spec = self.spec()
        assert parse(CacheSpec, spec.model_dump(mode="json"), "the spec") == spec

    def test_maps_come_back_within_the_error_that_it_allows(self, tmp_path: Path) -> None:
        """The relative error of each map is at most ``max_error``; sparse ones know where they are known."""
        spec = self.spec()
        reader, signals, source = self._write(tmp_path, spec)
        for name in (name for name in MAPS if name in spec.signals):
            for frame, token in enumerate(source.tokens):
                found, wanted = reader.signal(token, name), getattr(signals, name)[frame]
                if isinstance(found, SparseMap):
                    known = found.known.expand_as(wanted)
                    assert bool(known.any()), f"{name} is known nowhere"
                    found, wanted = found.values[known], wanted[known]
                assert isinstance(found, torch.Tensor)
                if name == "heatmap" and spec.signals[name].encoding in ("logits", "logit8"):
                    found, wanted = found.sigmoid(), wanted.sigmoid()
                    assert float((found - wanted).abs().max()) <= spec.signals[name].max_error, name
                else:
                    error = (found - wanted).norm() / wanted.norm()
                    assert float(error) <= spec.signals[name].max_error, f"{name} is off by {float(error):.3g}"

    def test_boxes_come_back_bit_by_bit(self, tmp_path: Path) -> None:
        """Those of at least ``min_score``; a frame without boxes is a frame."""
        spec = self.spec()
        if "boxes" not in spec.signals:
            return
        reader, signals, source = self._write(tmp_path, spec)
        assert signals.boxes is not None
        for token, boxes in zip(source.tokens, signals.boxes, strict=True):
            same_boxes(reader.boxes(token), boxes[boxes.scores >= spec.signals["boxes"].min_score])

    def test_points_come_back_for_annotated_boxes(self, tmp_path: Path) -> None:
        """Nine values per annotated box of labelled frames."""
        spec = self.spec()
        for name in (name for name in POINTS if name in spec.signals):
            reader, _, source = self._write(tmp_path, spec)
            for token in source.tokens:
                found = reader.signal(token, name)
                assert isinstance(found, BoxPoints)
                assert len(found) == (len(source.annotations(token)) if token in source.labelled else 0)

    def test_instances_come_back(self, tmp_path: Path) -> None:
        """With their boxes, labels and a mask each."""
        spec = self.spec()
        if "instances" not in spec.signals:
            return
        reader, signals, source = self._write(tmp_path, spec)
        assert signals.instances is not None
        for token, wanted in zip(source.tokens, signals.instances, strict=True):
            found = reader.signal(token, "instances")
            assert isinstance(found, Instances)
            assert sorted(found.labels.tolist()) == sorted(wanted.labels.tolist())
            assert all(bool(mask.any()) for mask in found.masks), "an empty mask"

    def test_a_cache_of_it_describes_itself(self, tmp_path: Path) -> None:
        """The manifest holds the spec, and each signal's worst error is within what it allows."""
        spec = self.spec()
        manifest = self._write(tmp_path, spec)[0].manifest
        assert manifest.spec == spec
        for record in manifest.records:
            for name, stats in record.stats.items():
                assert stats.error_max <= spec.signals[name].max_error, f"{name} is off by {stats.error_max}"


def _signals(source: MadeUpFrames) -> Signals:
    """Return signals like a teacher's: maps after ReLU, logits of rare objects, boxes of all scores, masks."""
    chance, (rows, columns) = torch.Generator().manual_seed(0), source.grid.shape
    frames = len(source.tokens)
    maps = {
        name: torch.randn(frames, channels, rows, columns, generator=chance).relu_()
        for name, channels in (("bev_low", 6), ("bev_high", 4))
    }
    heatmap = _LOGITS + torch.randn(frames, len(CLASSES), rows, columns, generator=chance)
    heatmap[:, 0, ::5, ::7] = 1.0
    code = torch.randn(frames, 2, 10, rows, columns, generator=chance)
    boxes = []
    for token in source.tokens:
        each = source.annotations(token)
        boxes.append(Boxes(each.values, each.labels, torch.rand(len(each), generator=chance)))
    values: dict[str, Any] = {**maps, "heatmap": heatmap, "box_code": code, "boxes": tuple(boxes)}
    depth = batch_of(source, View(frozenset({"camera", "lidar_depth"}), 32, 64)).lidar_depth
    return Signals(**values, instances=tuple(_instances() for _ in source.tokens), lidar_depth=depth)


def _instances() -> Instances:
    """Return two instances whose masks are discs and bars."""
    row, column = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 30), indexing="ij")
    masks = (row**2 + column**2 < 0.8, row.abs() < 0.5)
    corners = torch.tensor([[10.0, 20.0, 40.0, 60.0], [50.0, 5.0, 80.0, 45.0]])
    return Instances(torch.tensor([0, 1]), corners, torch.tensor([0, 2]), torch.tensor([0.9, 0.8]), masks)
