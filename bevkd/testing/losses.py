"""What a distillation loss has to hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.masks import STORED, in_views
from bevkd.geometry.sampling import points_of
from bevkd.models.detector import Detector, DetectorConfig, DetectorOutput, view_of
from bevkd.signals import MAPS, POINTS, SIGNALS
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of, check_terms
from bevkd.types import Boxes, Instances, Signals, ViewInstances

CLASSES = ("car", "truck", "pedestrian")
UNMOVED = BEVAffine.identity()
CAMERAS = 2
STUDENT: dict[str, Any] = {
    "grid": {"x_m": [-12.8, 12.8], "y_m": [-12.8, 12.8], "z_m": [-5, 3], "cell_m": 1.6},
    "encoder": {
        "name": "lift_splat",
        "backbone": {
            "model_type": "resnet",
            "options": {
                "embedding_size": 16,
                "hidden_sizes": [16, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2"],
            },
        },
        "image_height": 32,
        "image_width": 64,
        "stride": 8,
        "neck_channels": 8,
        "channels": 8,
        "depth": {"start": 2.0, "stop": 14.0, "step": 2.0},
    },
    "bev_encoder": {"layers": [0], "strides": [1], "channels": [8], "up_channels": [8]},
    "head": {
        "name": "center",
        "channels": 8,
        "tasks": [["car", "truck"], ["pedestrian"]],
        "min_radius": 1,
        "nms": {"type": "circle", "squared_distance": [4, 1]},
    },
}


class DistillLossTests:
    """Subclass it and define :meth:`build`; the student is a tiny camera detector, the teacher is made up."""

    student_config: dict[str, Any] = STUDENT

    def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
        """Return the loss's config and the loss for ``context``."""
        raise NotImplementedError("define build()")

    def _parts(self) -> tuple[DistillContext, DistillLossConfig, DistillLoss]:
        torch.manual_seed(0)
        student = Detector(parse(DetectorConfig, self.student_config, "the student"), CLASSES)
        shapes = {name: tuple(value.shape[1:]) for name, value in _teach(student).items()}
        shapes |= {name: (9, shapes[source][0]) for name, source in POINTS.items()}
        context = DistillContext(student, shapes)
        config, loss = self.build(context)
        assert config.misfits(context) == [], "a student with the teacher's shapes is refused"
        return context, config, loss

    def _batch(self, student: Detector, frames: tuple[int, ...], affine: BEVAffine) -> Batch:
        source = MadeUpFrames(CLASSES, student.config.grid)
        batch = batch_of(source, view_of(student.config), [source.tokens[frame] for frame in frames])
        moved = tuple(affine.apply_to_boxes(boxes) for boxes in batch.boxes)
        return dataclasses.replace(batch, boxes=moved, affines=(affine,) * len(frames))

    def _teacher(self, student: Detector, config: DistillLossConfig, batch: Batch, empty: bool = False) -> TeacherBatch:
        """Return a teacher that writes what the loss asks for, and nothing else."""
        wanted, grid = config.signals(), student.config.grid
        source = MadeUpFrames(CLASSES, grid)
        maps = _teach(student, len(batch))
        annotated = [source.annotations(token) for token in batch.tokens]
        held: dict[str, Any] = {name: maps[name] for name in MAPS if name in wanted}
        if "boxes" in wanted:
            held["boxes"] = tuple(Boxes.empty() if empty else boxes for boxes in annotated)
        seen = None
        if "instances" in wanted:
            nothing = in_views(Instances.empty(), torch.eye(3)[None], (1, 1))
            seen = tuple(nothing if empty else _view_instances(student, frame) for frame in range(len(batch)))
        for name in (name for name in POINTS if name in wanted):
            held[name] = tuple(
                points_of(maps[POINTS[name]][frame], boxes, grid) for frame, boxes in enumerate(annotated)
            )
        return TeacherBatch(Signals(**held), batch.affines, grid, seen)

    def _output(self, student: Detector, frames: int, dtype: torch.dtype = torch.float32) -> DetectorOutput:
        """Return maps of a student as leaves, so that their gradients can be looked at."""
        maps = {name: value.to(dtype).requires_grad_() for name, value in _teach(student, frames, seed=1).items()}
        head = type(student.head(torch.zeros(1, student.bev_encoder.out_channels, *student.config.grid.shape)))
        return DetectorOutput(
            maps["bev_low"],
            maps["bev_high"],
            head(maps["heatmap"], maps["box_code"]),
            image_features=maps["image_features"],
        )

    def _terms(
        self,
        frames: tuple[int, ...] = (0, 1, 2),
        affine: BEVAffine = UNMOVED,
        empty: bool = False,
        dtype: torch.dtype = torch.float32,
        spoilt: bool = False,
    ) -> tuple[dict[str, Tensor], DetectorOutput, DistillLoss]:
        context, config, loss = self._parts()
        batch = self._batch(context.student, frames, affine)
        output = self._output(context.student, len(frames), dtype)
        teacher = self._teacher(context.student, config, batch, empty)
        if spoilt:
            teacher = _SpoiltOutside(teacher.canonical, teacher.affines, teacher.grid, teacher.instances)
        before = [value.clone() for value in _tensors(teacher.canonical)]
        terms = loss(output, teacher, batch)
        for value, copy in zip(_tensors(teacher.canonical), before, strict=True):
            assert torch.equal(value.nan_to_num(), copy.nan_to_num()), "the loss changes what it reads"
        return terms, output, loss

    def test_it_says_what_it_reads(self) -> None:
        """``signals()`` names signals, each once."""
        _, config, _ = self._parts()
        names = config.signals()
        assert names, "it reads nothing"
        assert len(set(names)) == len(names), "a signal is named twice"
        assert set(names) <= set(SIGNALS), f"unknown signals {sorted(set(names) - set(SIGNALS))}"

    def test_gradients_reach_the_student(self) -> None:
        """Each term is one finite number, and their sum moves what the student says."""
        terms, output, loss = self._terms()
        check_terms(terms, least=0).backward()  # type: ignore[no-untyped-call]
        found = [value.grad for value in _leaves(output) if value.grad is not None]
        assert found, "no gradient reaches the student"
        assert all(bool(gradient.isfinite().all()) for gradient in found), "a gradient that is not finite"
        assert sum(float(gradient.abs().sum()) for gradient in found) > 0, "no gradient reaches the student"
        if isinstance(loss, nn.Module):
            for name, parameter in loss.named_parameters():
                assert parameter.grad is not None, f"no gradient reaches the loss's own {name}"

    def test_the_students_parameters_do_not_become_the_losses(self) -> None:
        """They would be trained twice, and saved with the loss."""
        context, _, loss = self._parts()
        own = {id(parameter) for parameter in loss.parameters()} if isinstance(loss, nn.Module) else set()
        assert own.isdisjoint(id(parameter) for parameter in context.student.parameters())

    def test_it_is_a_function_of_its_arguments(self) -> None:
        """The same student, teacher and batch give the same terms."""
        first, second = self._terms()[0], self._terms()[0]
        assert {name: value.item() for name, value in first.items()} == {
            name: value.item() for name, value in second.items()
        }

    def test_augmented_frames_are_no_fault(self) -> None:
        """The teacher is un-augmented, the student is turned, scaled and mirrored."""
        terms = self._terms(affine=BEVAffine(flip_x=True, rotation_rad=0.4, scale=1.05))[0]
        check_terms(terms, least=0)

    def test_cells_that_the_teacher_does_not_cover_are_not_read(self) -> None:
        """Under a turn the corners of warped maps hold nothing: other values there change no term."""
        affine = BEVAffine(rotation_rad=0.6, scale=0.9, translation_m=(3.0, -2.0, 0.1))
        clean, spoilt = (self._terms(affine=affine, spoilt=each)[0] for each in (False, True))
        for name, value in clean.items():
            assert torch.equal(value, spoilt[name]), f"{name} reads cells that the mask of warped() leaves out"

    def test_frames_without_labels_or_boxes_are_no_fault(self) -> None:
        """A batch of one empty and one unlabelled frame gives finite terms that can be propagated."""
        terms, output, _ = self._terms(frames=(1, 2))
        total = check_terms(terms, least=0)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for value in _leaves(output):
            assert value.grad is None or bool(value.grad.isfinite().all()), "a gradient that is not finite"

    def test_a_teacher_that_finds_nothing_is_no_fault(self) -> None:
        """No box on any frame gives finite terms that can be propagated."""
        total = check_terms(self._terms(empty=True)[0], least=0)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]

    def test_half_precision_maps_are_no_fault(self) -> None:
        """Losses run outside autocast: they widen what a student in half precision says."""
        check_terms(self._terms(dtype=torch.bfloat16)[0], least=0)


@dataclasses.dataclass(frozen=True)
class _SpoiltOutside(TeacherBatch):
    """A teacher whose warped maps hold nonsense where their mask is False."""

    def warped(self, name: str) -> tuple[Tensor, Bool[Tensor, "B 1 Y X"]]:
        values, covered = super().warped(name)
        assert not bool(covered.all())
        kept = covered[:, None] if values.ndim == 5 else covered
        return torch.where(kept, values, 1e3), covered


def _teach(student: Detector, frames: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return maps with the shapes of the student's own."""
    chance = torch.Generator().manual_seed(seed)
    grid = student.config.grid.shape
    shapes = {
        "bev_low": (student.encoder.out_channels, *grid),
        "bev_high": (student.bev_encoder.out_channels, *grid),
        "heatmap": (len(student.classes), *grid),
        "box_code": (len(student.head.labels_of_task), 10, *grid),
    }
    maps = {name: torch.randn(frames, *shape, generator=chance) for name, shape in shapes.items()}
    view, stride = view_of(student.config), student.encoder.stride
    size = (view.image_height // stride, view.image_width // stride)
    features = torch.randn(frames, CAMERAS, student.encoder.image_channels, *size, generator=chance)
    return {**maps, "image_features": features}


def _view_instances(student: Detector, frame: int) -> ViewInstances:
    """Return two instances of a frame in the views of both cameras: discs in boxes of other shapes."""
    view = view_of(student.config)
    left, top = 4.0 + frame, 2.0 + frame
    boxes = torch.tensor(
        [[left, top, left + 9, top + 17], [left, top, view.image_width - 3.0, view.image_height - 2.0]]
    )
    across = torch.linspace(-1, 1, STORED)
    disc = across[:, None] ** 2 + across**2 < 1
    return ViewInstances(torch.arange(2), boxes, torch.tensor([0, 2]), torch.tensor([0.9, 0.5]), disc.expand(2, -1, -1))


def _leaves(output: DetectorOutput) -> list[Tensor]:
    assert output.image_features is not None
    return [output.bev_low, output.bev_high, output.head.heatmap, output.head.box_code, output.image_features]


def _tensors(signals: Signals) -> list[Tensor]:
    """Return all tensors that signals hold."""
    found: list[Tensor] = []
    for field in dataclasses.fields(signals):
        value = getattr(signals, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor):
                found.append(each)
            elif dataclasses.is_dataclass(each):
                found += [part for part in vars(each).values() if isinstance(part, Tensor)]
    return found
