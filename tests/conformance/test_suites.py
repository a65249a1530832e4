"""The suites notice plug-ins that do not hold what they should."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from bevkd import testing
from bevkd.cache.spec import CacheSpec
from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.data.images import ImageView
from bevkd.data.join import View
from bevkd.data.source import FrameSource, Sensor
from bevkd.distill import x3kd
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.models.detector import DetectorOutput
from bevkd.models.encoders import lift_splat
from bevkd.models.heads import center
from bevkd.models.heads.center import CenterHead, CenterTargets, HeadOutput
from bevkd.teachers import detector
from bevkd.teachers.base import Teacher
from bevkd.teachers.detector import DetectorTeacher
from bevkd.types import Boxes, Frame, Signals
from tests.conformance import cases

# ---------------------------------------------------------------------------------------------- teachers


class Teachers(testing.TeacherTests):
    def teacher(self) -> Teacher:
        config = detector.Config.model_validate({"name": "detector", "detector": cases.DETECTOR})
        return self.spoilt(detector.build(config, cases.CLASSES, torch.device("cpu")))

    def spoilt(self, teacher: Teacher) -> Teacher:
        return teacher


def test_a_teacher_in_training_mode_is_noticed() -> None:
    class Training(Teachers):
        def spoilt(self, teacher: Teacher) -> Teacher:
            assert isinstance(teacher, DetectorTeacher)
            teacher._detector.train()
            return teacher

    with pytest.raises(AssertionError):
        Training().test_a_frame_does_not_depend_on_its_batch()


def test_a_teacher_that_promises_another_shape_is_noticed() -> None:
    class Promising(Teachers):
        def spoilt(self, teacher: Teacher) -> Teacher:
            teacher.shapes = {**teacher.shapes, "bev_high": (99, *teacher.grid.shape)}
            return teacher

    with pytest.raises(AssertionError, match="bev_high has the shape"):
        Promising().test_it_writes_what_it_promises()


def test_a_teacher_with_other_weights_each_time_is_noticed() -> None:
    class Changing(Teachers):
        built = 0

        def spoilt(self, teacher: Teacher) -> Teacher:
            assert isinstance(teacher, DetectorTeacher)
            self.built += 1
            with torch.no_grad():
                next(teacher._detector.parameters()).mul_(self.built)
            return teacher

    with pytest.raises(AssertionError):
        Changing().test_it_can_be_built_again()


# ---------------------------------------------------------------------------------------------- encoders and heads


class Encoders(testing.EncoderTests):
    view = View(frozenset({"camera"}), cases.CAMERA["image_height"], cases.CAMERA["image_width"])

    def encoder(self) -> nn.Module:
        config = lift_splat.Config.model_validate({"name": "lift_splat", **cases.CAMERA})
        encoder = lift_splat.build(config, self.grid)
        encoder.left_over = nn.Linear(1, 1)
        return encoder


def test_a_part_of_an_encoder_that_nothing_trains_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"no gradient reaches left_over\.weight"):
        Encoders().test_gradients_reach_every_parameter()


class SpoiltHead(CenterHead):
    def loss(self, output: HeadOutput, targets: CenterTargets, labelled: Tensor) -> dict[str, Tensor]:
        return super().loss(output, targets, torch.ones_like(labelled))

    def decode(self, output: HeadOutput) -> list[Boxes]:
        return super().decode(dataclasses.replace(output, heatmap=output.heatmap.flip(-1)))


class Heads(testing.HeadTests):
    steps = 60

    def head(self, in_channels: int) -> Any:
        config = center.Config.model_validate({"name": "center", **cases.HEADS["center"]})
        return SpoiltHead(config, in_channels, self.grid, self.classes)


def test_a_loss_over_unlabelled_frames_is_noticed() -> None:
    with pytest.raises(AssertionError):
        Heads().test_unlabelled_frames_add_nothing()
    with pytest.raises(AssertionError, match="a loss without labels"):
        Heads().test_a_batch_without_any_label_is_no_fault()


def test_decoding_that_mirrors_the_map_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"m away|no box"):
        Heads().test_a_head_that_is_trained_on_one_frame_finds_its_boxes()


# ---------------------------------------------------------------------------------------------- losses


class SpoiltLoss(nn.Module):
    """Scales what it reads, keeps the student's head, and compares nothing where the teacher finds nothing."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        del batch
        boxes = teacher.canonical.boxes or ()
        scores = torch.cat([each.scores for each in boxes])
        scores *= 0.5
        return {"mean": student.head.heatmap.mean().square() / scores.sum()}


class Losses(testing.DistillLossTests):
    def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
        return x3kd.Config(), SpoiltLoss(context.student.head)


def test_a_loss_that_divides_by_the_number_of_boxes_is_noticed() -> None:
    with pytest.raises(AssertionError, match="mean is"):
        Losses().test_a_teacher_that_finds_nothing_is_no_fault()


def test_a_loss_that_keeps_the_students_weights_is_noticed() -> None:
    with pytest.raises(AssertionError):
        Losses().test_the_students_parameters_do_not_become_the_losses()


def test_a_loss_that_changes_the_cached_signals_is_noticed() -> None:
    class Writing(testing.DistillLossTests):
        def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
            del context

            def loss(student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
                del batch
                for boxes in teacher.canonical.boxes or ():
                    boxes.values.mul_(2)
                return {"mean": student.head.heatmap.mean().square()}

            return x3kd.Config(), loss

    with pytest.raises(AssertionError, match="changes what it reads"):
        Writing().test_gradients_reach_the_student()


class Weighed(DistillLossConfig):
    """Two terms, the second of which is named wrongly, not weighted and reads what is not there."""

    weights: ClassVar[tuple[str, ...]] = ("first", "second")
    name: Literal["weighed"] = "weighed"
    first: float = 1.0
    second: float = 1.0
    odd: bool = False

    def signals(self) -> tuple[str, ...]:
        return ("bev_high", *(("heatmap",) if self.first > 0 or self.odd else ()))


def build(config: Weighed, context: DistillContext) -> DistillLoss:
    del context

    def loss(student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        del teacher, batch
        terms = {"first": config.first * student.bev_high.square().mean()}
        return terms | {"third" if config.odd else "second": student.bev_low.square().mean()}

    return loss


@pytest.mark.parametrize(
    ("odd", "test", "message"),
    [
        (True, "test_every_term_belongs_to_a_weight", "third is called after 0"),
        (False, "test_a_weight_of_zero_switches_its_terms_off", "first: 0 leaves other terms"),
        (False, "test_twice_the_weight_is_twice_the_terms", "second at twice second"),
    ],
)
def test_a_term_that_does_not_follow_its_weight_is_noticed(odd: bool, test: str, message: str) -> None:
    class Unweighted(testing.DistillLossTests):
        def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
            config = Weighed(odd=odd)
            return config, build(config, context)

    with pytest.raises(AssertionError, match=message):
        getattr(Unweighted(), test)()


# ---------------------------------------------------------------------------------------------- data and specs


class SpoiltFrames(testing.MadeUpFrames):
    """Boxes in another frame than the points, labels on every frame, images without the view's intrinsics."""

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        frame = super().load(token, sensors, views)
        rig = None if frame.rig is None else dataclasses.replace(frame.rig, intrinsics=torch.eye(3).expand(2, 3, 3))
        return dataclasses.replace(frame, boxes=self.annotations(token), rig=rig)

    def annotations(self, token: str) -> Boxes:
        boxes = super().annotations(token)
        return Boxes(boxes.values + torch.tensor([0.0, 0.0, 40.0, *[0.0] * 6]), boxes.labels, boxes.scores)

    def _scan(self, token: str) -> Tensor:
        return super()._scan(token) * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])


class Sources(testing.FrameSourceTests):
    sensors = frozenset({"lidar", "camera"})

    def source(self) -> FrameSource:
        return SpoiltFrames(cases.CLASSES, testing.EncoderTests.grid)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_returns_fall_into_boxes", "boxes are empty"),
        ("test_boxes_are_those_of_labelled_frames", "not labelled"),
        ("test_images_are_the_views_that_were_asked_for", "Tensor-likes are not close"),
    ],
)
def test_a_data_set_in_another_frame_or_with_other_labels_or_intrinsics_is_noticed(test: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(Sources(), test)()


def test_a_spec_that_loses_boxes_is_noticed(tmp_path: Path) -> None:
    class Narrow(testing.CacheSpecTests):
        def spec(self) -> CacheSpec:
            signals = {"boxes": {"encoding": "boxes", "capacity": 2}}
            return parse(CacheSpec, {"name": "narrow", "signals": signals}, "the spec")

    with pytest.raises(AssertionError, match="2 boxes instead of"):
        Narrow().test_boxes_come_back_bit_by_bit(tmp_path)


def test_signals_of_a_suites_own_teacher_are_those_of_its_batch() -> None:
    """Without this the tests above could pass because every teacher fails."""

    def infer(suite: Teachers) -> Signals:
        return suite._infer(suite.teacher(), 0)

    suite = Teachers()
    suite.test_a_frame_does_not_depend_on_its_batch()
    suite.test_it_writes_what_it_promises()
    suite.test_it_can_be_built_again()
    assert infer(suite).boxes is not None
