"""TiG-BEV: the released values (golden.md, 1.9) and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from bevkd.distill.tigbev import Config, build, inner_points, relation_loss
from bevkd.geometry.affine import BEVAffine
from tests.distill.kit import CHANNELS, GRID, THEIRS, batch_of, boxes, context, floats, maps, output, teacher
from tests.geometry.strategies import D4
from tests.golden import T


def test_both_terms_have_the_released_values() -> None:
    student, theirs = (each.flatten(2).mT for each in (T(3, 6, 5, 4), T(3, 6, 5, 4, k=1.2)))
    assert 100 * relation_loss(student, theirs).item() == pytest.approx(100.727905, rel=1e-4)
    assert 10 * relation_loss(student.mT, theirs.mT).item() == pytest.approx(14.076843, rel=1e-4)


def test_relations_do_not_change_when_all_features_are_turned_or_grow() -> None:
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 9, 5, generator=chance)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=chance))[0]
    assert relation_loss(rows, 3 * rows @ turn).item() == pytest.approx(0, abs=1e-6)


def test_points_fill_the_enlarged_box_up_to_its_edges() -> None:
    (points,) = inner_points(boxes((1, 2, 4, 2, math.pi / 2, 0)).values, side=3, margin_m=1.0)
    # Turned by a quarter, the length of 4 m lies along y.
    torch.testing.assert_close(points.amin(dim=0), torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(points.amax(dim=0), torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(points.mean(dim=0), torch.tensor([1.0, 2.0]))
    assert len(points) == 9


@pytest.mark.parametrize("affine", D4)
def test_turning_the_student_with_the_world_changes_nothing(affine: BEVAffine) -> None:
    torch.manual_seed(0)
    loss, annotated = build(Config(side=4), context()), boxes((1.3, -2.2, 3, 2, 0.4, 0), (-3, 3.1, 2, 1, 1.0, 1))
    student, theirs = maps(1, CHANNELS, 1), maps(2, THEIRS, 1)
    plain = loss(output(student), teacher(theirs), batch_of(annotated))
    turned = {name: affine.warp_map(value[0], GRID)[0][None] for name, value in student.items() if value.ndim == 4}
    batch = batch_of(affine.apply_to_boxes(annotated), affine=affine)
    found = loss(output({**student, **turned}), teacher(theirs, affine), batch)
    # A mirrored box lists its points in another order, which reorders rows and columns alike.
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_frames_without_boxes_give_zeros() -> None:
    loss = build(Config(side=4), context())
    terms = loss(output(maps(1, CHANNELS)), teacher(maps(2, THEIRS)), batch_of(boxes(), boxes()))
    assert floats(terms) == {"keypoint": 0.0, "channel": 0.0}
