"""LabelDistill: the released value (golden.md, 1.8) and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from bevkd.distill.labeldistill import Config, LabelDistill, build, feature_loss, response_heatmap_loss
from tests.distill.kit import CHANNELS, TASKS, THEIRS, batch_of, boxes, context, floats, maps, output, teacher
from tests.golden import T

EMPTY = boxes()


def loss(**config: object) -> LabelDistill:
    torch.manual_seed(0)
    built = build(Config.model_validate(config), context())
    assert isinstance(built, LabelDistill)
    return built


def test_the_features_have_the_released_value() -> None:
    labels = torch.cat([T(2, 1, 8, 8).sigmoid(), T(2, 2, 8, 8, k=1.1).sigmoid()], dim=1).sum(dim=1, keepdim=True)
    coarse = functional.interpolate(labels, size=(4, 4), mode="bilinear", align_corners=True)
    fine = feature_loss(T(2, 4, 8, 8, k=1.2), T(2, 4, 8, 8), labels)
    total = fine + feature_loss(T(2, 6, 4, 4, k=1.4), T(2, 6, 4, 4, k=0.9), coarse)
    assert total.item() == pytest.approx(9.88496590, rel=1e-5)


def test_features_count_where_annotations_were_drawn() -> None:
    built, held = loss(response=0, stride=1), maps(1, THEIRS)
    built.adapters["bev_low"] = nn.Conv2d(CHANNELS, THEIRS, 1)
    student = maps(2, CHANNELS)
    student["bev_low"].requires_grad_()
    terms = built(output(student), teacher(held), batch_of(boxes((0.5, 0.5, 2, 1, 0, 1)), EMPTY))
    terms["feature"].backward()
    gradient = student["bev_low"].grad
    assert gradient is not None
    touched = gradient.abs().sum(dim=1).nonzero()
    assert set(touched[:, 0].tolist()) == {0}
    assert touched[:, 1:].float().mean(dim=0).tolist() == [8.0, 8.0]


def test_cells_are_compared_in_squares_that_the_teacher_covers_as_a_whole() -> None:
    built, ones = loss(response=0), torch.ones(1, 1, 5, 5)
    covered = ones > 0
    covered[0, 0, 0, 0] = False
    theirs = torch.arange(25.0).view(1, 1, 5, 5)
    means, mask = built._coarse(theirs, ones, covered)
    assert mask[0, 0].tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert means[0, 0].tolist() == [[(1 + 5 + 6) / 4, 5, 6.5], [13, 15, 16.5], [20.5, 22.5, 24]]
    assert built.adapters["bev_low"](torch.zeros(2, CHANNELS, 5, 5)).shape == (2, THEIRS, 3, 3)


def test_the_teachers_probability_is_the_target_only_as_far_as_an_annotation_was_drawn() -> None:
    drawn, mask = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    drawn[0, 0, 0, 0] = 0.5
    student, theirs = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    found = response_heatmap_loss(student, theirs, drawn, mask, torch.tensor([2.0])).item()
    assert found == pytest.approx((0.75**4 + 3) * 0.25 * math.log(2) / 2, rel=1e-5)


def test_boxes_are_compared_at_annotations_with_the_heads_own_weights() -> None:
    built, student, theirs = loss(feature=0), maps(1, CHANNELS), maps(2, THEIRS)
    annotated = boxes((2.5, -1.5, 3, 2, 0, 0), (-3.5, 4.5, 1, 1, 0, 2), (5.5, 5.5, 1, 1, 0, 1))
    terms = built(output(student), teacher(theirs), batch_of(annotated, EMPTY))
    error = (student["box_code"] - theirs["box_code"]).abs() * torch.tensor([1.0] * 8 + [0.2] * 2)[:, None, None]
    car, others = error[0, 0, :, 6, 10].sum(), error[0, 1, :, 12, 4].sum() + error[0, 1, :, 13, 13].sum()
    assert len(TASKS) == 2
    assert terms["response_box"].item() == pytest.approx(0.25 * (car + others / 2).item(), rel=1e-5)


def test_frames_without_labels_add_nothing() -> None:
    terms = loss()(output(maps(1, CHANNELS)), teacher(maps(2, THEIRS)), batch_of(EMPTY, EMPTY, labelled=False))
    assert set(floats(terms).values()) == {0.0}


def test_a_head_without_heatmaps_of_its_own_is_refused() -> None:
    held = context()
    held.student.head = object()
    (fault,) = Config(response=0, stages=("bev_high",)).misfits(held)
    assert "head 'center'" in fault
