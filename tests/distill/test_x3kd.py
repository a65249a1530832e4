"""X3KD: closed forms (golden.md, section 2), since the paper has no public code."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.distill.x3kd import (
    AdversarialTraining,
    Config,
    FeatureDistillation,
    OutputDistillation,
    adversarial_loss,
    reverse_gradient,
    sparse_distance,
)
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.models.heads import center
from bevkd.models.heads.center import CenterHead, HeadOutput
from bevkd.types import Boxes, Signals

GRID = BEVGrid(x_m=(-8, 8), y_m=(-8, 8), cell_m=1.0)
CLASSES = ("car", "pedestrian", "cone")


def head() -> CenterHead:
    config = center.Config(tasks=(("car",), ("pedestrian", "cone")), channels=8, min_radius=1)
    return center.build(config, 4, GRID, CLASSES)


def found(scores: tuple[float, ...] = (0.9, 0.6, 0.5)) -> Boxes:
    values = torch.tensor(
        [
            [2.2, -3.1, 0.1, 4.2, 1.8, 1.5, 0.4, 3.0, -1.0],
            [-4.4, 5.7, -0.3, 0.7, 0.6, 1.7, 2.0, 0.5, 0.2],
            [6.1, 6.3, 0.0, 0.4, 0.4, 1.0, -1.0, 0.0, 0.0],
        ]
    )
    return Boxes(values, torch.tensor([0, 1, 2]), torch.tensor(scores))


def maps(batch: int, seed: int = 0) -> DetectorOutput:
    generator = torch.Generator().manual_seed(seed)
    heatmap = torch.randn(batch, 3, 16, 16, generator=generator).requires_grad_()
    code = torch.randn(batch, 2, 10, 16, 16, generator=generator).requires_grad_()
    return DetectorOutput(torch.zeros(batch, 1, 16, 16), torch.zeros(batch, 1, 16, 16), HeadOutput(heatmap, code))


def run(
    student: DetectorOutput, boxes: tuple[Boxes, ...], affines: tuple[BEVAffine, ...] | None = None, **config: Any
) -> dict[str, Tensor]:
    affines = affines or (BEVAffine.identity(),) * len(boxes)
    teacher = TeacherBatch(Signals(boxes=boxes), affines, GRID)
    return OutputDistillation(Config(**config), head())(student, teacher)


def test_scaling_all_scores_leaves_the_box_term_unchanged() -> None:
    whole = run(maps(1), (found((0.9, 0.6, 0.5)),), score=0.1)
    half = run(maps(1), (found((0.45, 0.3, 0.25)),), score=0.1)
    torch.testing.assert_close(half["output_box"], whole["output_box"])


def test_the_box_term_is_the_score_weighted_mean_of_smooth_l1() -> None:
    student, boxes = maps(1), found()
    targets = head().targets((boxes,))
    weights = torch.tensor(head().config.code_weights)
    each = []
    for (frame, task, row, column), code in zip(targets.cells.tolist(), targets.codes, strict=True):
        error = (student.head.box_code[frame, task, :, row, column] - code).abs()
        each.append((torch.where(error < 1, error**2 / 2, error - 0.5) * weights).sum())
    expected = (torch.stack(each) * boxes.scores).sum() / boxes.scores.sum()
    torch.testing.assert_close(run(student, (boxes,), box=1.0)["output_box"], expected)


def test_only_boxes_above_the_score_are_targets() -> None:
    student = maps(1)
    strict, fewer = run(student, (found(),), score=0.55), run(student, (found()[:2],), score=0.0)
    torch.testing.assert_close(strict, fewer)


@pytest.mark.parametrize("boxes", [Boxes.empty(), found((0.1, 0.1, 0.1))], ids=["none", "none confident"])
def test_no_pseudo_label_at_all_gives_a_finite_loss_with_a_gradient(boxes: Boxes) -> None:
    student = maps(2)
    terms = run(student, (boxes, boxes))
    torch.stack([*terms.values()]).sum().backward()
    assert terms["output_box"].item() == 0
    assert terms["output_heatmap"].item() > 0
    heatmap, code = student.head.heatmap.grad, student.head.box_code.grad
    assert heatmap is not None
    assert code is not None
    assert bool(heatmap.isfinite().all())
    assert float(code.abs().sum()) == 0


def test_unlabelled_frames_learn_from_the_teacher_and_not_from_annotations() -> None:
    student = maps(1)
    own = head()
    detection = own.loss(student.head, own.targets((Boxes.empty(),)), torch.tensor([False]))
    torch.stack([*detection.values()]).sum().backward()
    assert student.head.heatmap.grad is not None
    assert float(student.head.heatmap.grad.abs().sum()) == 0
    torch.stack([*run(student, (found(),)).values()]).sum().backward()
    assert float(student.head.heatmap.grad.abs().sum()) > 0


def test_a_student_that_agrees_with_the_teacher_has_almost_no_loss() -> None:
    targets = head().targets((found(),))
    code = torch.zeros(1, 2, 10, 16, 16)
    frame, task, row, column = targets.cells.unbind(1)
    code[frame, task, :, row, column] = targets.codes
    logits = torch.where(targets.heatmap == 1, 12.0, -12.0)
    empty = torch.zeros(1, 1, 16, 16)
    terms = run(DetectorOutput(empty, empty, HeadOutput(logits, code)), (found(),))
    assert terms["output_box"].item() < 1e-9
    assert terms["output_heatmap"].item() < 1e-4


def test_an_unknown_velocity_teaches_nothing() -> None:
    boxes = found()
    boxes.values[0, 7:9] = torch.nan
    student = maps(1)
    terms = run(student, (boxes,))
    torch.stack([*terms.values()]).sum().backward()
    code = student.head.box_code.grad
    assert code is not None
    assert bool(code.isfinite().all())
    _, task, row, column = head().targets((boxes,)).cells[0].tolist()
    assert code[0, task, 8:, row, column].tolist() == [0.0, 0.0]
    assert float(code[0, task, :8, row, column].abs().sum()) > 0


def test_targets_move_with_the_students_augmentation() -> None:
    affine = BEVAffine(flip_x=True, rotation_rad=0.3, scale=1.05)
    student = maps(1)
    moved = run(student, (affine.apply_to_boxes(found()),))
    torch.testing.assert_close(run(student, (found(),), (affine,)), moved)


def test_the_terms_carry_their_weights() -> None:
    student = maps(1)
    unit = run(student, (found(),), output=1.0, box=1.0)
    weighted = run(student, (found(),), output=3.0, box=0.5)
    torch.testing.assert_close(weighted["output_heatmap"], 3 * unit["output_heatmap"])
    torch.testing.assert_close(weighted["output_box"], 1.5 * unit["output_box"])


def test_the_heads_weights_do_not_become_the_losses() -> None:
    assert list(OutputDistillation(Config(), head()).parameters()) == []


def test_without_weight_it_reads_nothing() -> None:
    assert Config().signals() == ("boxes",)
    assert Config(output=0).signals() == ()


def test_half_precision_maps_give_a_float32_loss() -> None:
    full = maps(1)
    half = dataclasses.replace(full, head=HeadOutput(full.head.heatmap.bfloat16(), full.head.box_code.bfloat16()))
    terms = run(half, (found(),))
    assert {value.dtype for value in terms.values()} == {torch.float32}
    torch.testing.assert_close(terms, run(full, (found(),)), rtol=2e-2, atol=1e-2)


def test_a_student_with_anchors_is_told_before_the_first_batch() -> None:
    """Anchors have no heatmap targets."""

    def context(own_head: object) -> DistillContext:
        return DistillContext(cast(Detector, SimpleNamespace(head=own_head)), {})

    assert Config().misfits(context(head())) == []
    (fault,) = Config().misfits(context(object()))
    assert "give the student the head 'center'" in fault
    assert Config(output=0).misfits(context(object())) == []


# ------------------------------------------------------------------------------------------------------ X-FD, X-AT


def sparse_map(batch: int = 2, channels: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, channels, 16, 16, generator=generator)
    return values * (torch.rand(batch, 1, 16, 16, generator=generator) < 0.3)


def bev(seed: int = 1, channels: int = 4) -> DetectorOutput:
    values = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    nothing = HeadOutput(torch.zeros(2, 3, 16, 16), torch.zeros(2, 2, 10, 16, 16))
    return DetectorOutput(values.clone().requires_grad_(), values.clone().requires_grad_(), nothing)


EVERYWHERE = torch.ones(2, 1, 16, 16, dtype=torch.bool)
UNMOVED = (BEVAffine.identity(),) * 2


@pytest.mark.parametrize("distance", ["l1", "smooth_l1", "l2"])
def test_a_perfect_prediction_costs_nothing_whatever_stands_in_empty_cells(distance: Any) -> None:
    target = sparse_map()
    occupied = (target != 0).any(dim=1, keepdim=True)
    predicted = torch.where(occupied, target, 123.0)
    assert sparse_distance(predicted, target, EVERYWHERE, distance) == 0
    assert sparse_distance(predicted, target, EVERYWHERE, distance, empty=0.5) > 0


def test_the_feature_loss_is_the_mean_over_channels_and_occupied_cells() -> None:
    target = torch.zeros(1, 2, 16, 16)
    target[0, :, 3, 4], target[0, 0, 5, 6] = 1.0, 2.0
    found = sparse_distance(torch.zeros_like(target), target, EVERYWHERE[:1], "l1")
    torch.testing.assert_close(found, torch.tensor((1.0 + 1.0) / 2))
    torch.testing.assert_close(
        sparse_distance(torch.ones_like(target), target, EVERYWHERE[:1], "l1", empty=0.5),
        torch.tensor((0.0 + 1.0 + 0.5 * 254) / (2 + 0.5 * 254)),
    )


def test_an_empty_sparse_map_gives_a_finite_loss() -> None:
    assert sparse_distance(torch.ones(2, 4, 16, 16), torch.zeros(2, 4, 16, 16), EVERYWHERE, "l1") == 0


def test_cells_that_the_teacher_does_not_cover_are_not_learned() -> None:
    torch.manual_seed(0)
    feature = FeatureDistillation(Config(feature=2.0, empty=1.0, decoder_channels=8), 4, 4)
    gone = BEVAffine(translation_m=(40.0, 0.0, 0.0))
    term = feature(bev(), TeacherBatch(Signals(bev_low=sparse_map()), (gone, gone), GRID))["feature"]
    assert term.item() == 0


def test_the_decoder_and_the_student_learn_features_and_the_teacher_does_not() -> None:
    torch.manual_seed(0)
    feature, student, target = FeatureDistillation(Config(feature=1.0), 4, 6), bev(), sparse_map(channels=6)
    feature(student, TeacherBatch(Signals(bev_low=target), UNMOVED, GRID))["feature"].backward()
    assert student.bev_low.grad is not None
    assert student.bev_low.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in feature.parameters())
    assert not target.requires_grad


def test_reversal_passes_values_and_turns_gradients_round() -> None:
    values = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    turned = reverse_gradient(values, 0.7)
    assert torch.equal(turned, values)
    weights = torch.arange(5.0)
    (turned * weights).sum().backward()
    assert torch.equal(values.grad, -0.7 * weights)


def test_a_judge_that_cannot_tell_costs_log_2_on_either_side() -> None:
    zeros = torch.zeros(2, 1, 16, 16)
    assert adversarial_loss(zeros, zeros, EVERYWHERE).item() == pytest.approx(2 * math.log(2))


def test_the_judge_learns_to_tell_and_the_student_to_mislead() -> None:
    """With the step of its own gradient the judge's loss falls, with the student's it grows."""
    torch.manual_seed(0)
    adversary, student = AdversarialTraining(Config(adversarial=1.0), 4, 4), bev()
    teacher = TeacherBatch(Signals(bev_high=sparse_map()), UNMOVED, GRID)
    before = adversary(student, teacher)["adversarial"]
    before.backward()
    assert student.bev_high.grad is not None
    with torch.no_grad():
        moved = dataclasses.replace(student, bev_high=student.bev_high - 50 * student.bev_high.grad)
        assert adversary(moved, teacher)["adversarial"] > before
        for parameter in adversary.parameters():
            assert parameter.grad is not None
            parameter -= 0.05 * parameter.grad
        assert adversary(student, teacher)["adversarial"] < before


def test_other_channels_of_the_student_are_brought_to_the_teachers() -> None:
    torch.manual_seed(0)
    adversary = AdversarialTraining(Config(adversarial=1.0), 5, 4)
    teacher = TeacherBatch(Signals(bev_high=sparse_map()), UNMOVED, GRID)
    assert adversary(bev(channels=5), teacher)["adversarial"].isfinite()


def test_the_reversed_gradient_rises_over_the_ramp_and_goes_on_after_a_restart() -> None:
    def factors(adversary: AdversarialTraining, count: int) -> list[float]:
        return [adversary._factor() for _ in range(count)]

    config = Config(adversarial=1.0, reversal=0.5, ramp=4)
    whole = factors(AdversarialTraining(config, 4, 4), 7)
    assert whole[0] == 0
    assert whole == sorted(whole)
    assert whole[4:] == [0.5 * (2 / (1 + math.exp(-10)) - 1)] * 3
    first, second = AdversarialTraining(config, 4, 4), AdversarialTraining(config, 4, 4)
    start = factors(first, 3)
    second.load_state_dict(first.state_dict())
    assert start + factors(second, 4) == whole


def test_evaluation_does_not_advance_the_ramp() -> None:
    adversary = AdversarialTraining(Config(adversarial=1.0, ramp=4), 4, 4).eval()
    assert {adversary._factor() for _ in range(3)} == {0.0}


def test_terms_without_weight_read_nothing_and_have_no_parameters() -> None:
    assert Config().signals() == ("boxes",)
    assert Config(output=0, feature=1).signals() == ("bev_low",)
    assert Config(feature=1, adversarial=0.1).signals() == ("boxes", "bev_low", "bev_high")
