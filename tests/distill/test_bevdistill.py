"""BEVDistill: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bevkd.distill.bevdistill import BEVDistill, Config, build, contrast_loss
from bevkd.geometry.affine import BEVAffine
from tests.distill.kit import CHANNELS, THEIRS, batch_of, boxes, context, floats, maps, output, teacher

KEPT = torch.ones(3, dtype=torch.bool)


def loss(**config: object) -> BEVDistill:
    torch.manual_seed(0)
    built = build(Config.model_validate(config), context())
    assert isinstance(built, BEVDistill)
    return built


def test_orthogonal_objects_are_told_apart_as_well_as_the_temperature_lets_them() -> None:
    found = contrast_loss(5 * torch.eye(3), torch.eye(3), KEPT, 0.5).item()
    assert found == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-5)


def test_objects_that_are_all_alike_cannot_be_told_apart() -> None:
    assert contrast_loss(torch.ones(3, 2), torch.ones(3, 2), KEPT, 0.07).item() == pytest.approx(math.log(3))


def test_objects_left_out_are_neither_sought_nor_found() -> None:
    kept = torch.tensor([True, False, True])
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    others = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    found = contrast_loss(vectors, others, kept, 0.2)
    torch.testing.assert_close(found, contrast_loss(vectors[kept], others[kept], KEPT[:2], 0.2))


def test_features_count_by_the_gaussian_around_a_box() -> None:
    built, student, theirs = loss(contrast=0), maps(1, CHANNELS), maps(2, THEIRS)
    built.adapter = nn.Conv2d(CHANNELS, THEIRS, 1)
    # A radius of one cell has a sigma of half a cell.
    terms = built(output(student), teacher(theirs), batch_of(boxes((0.5, 0.5, 0.4, 0.4, 0, 1)), boxes()))
    error = (built.adapter(student["bev_high"]) - theirs["bev_high"]).square().sum(dim=1)[0, 7:10, 7:10]
    step = torch.tensor([-1.0, 0.0, 1.0])
    mask = torch.exp(-2 * (step[:, None] ** 2 + step**2))
    assert terms["dense"].item() == pytest.approx(0.01 * ((error * mask).sum() / mask.sum()).item(), rel=1e-4)


def test_boxes_beyond_the_teachers_map_are_left_out() -> None:
    affine = BEVAffine(translation_m=(6.0, 0.0, 0.0))
    near, far = (2.5, 0.5, 2, 1, 0.0, 0), (-6.5, 0.5, 2, 1, 0.0, 0)
    built, held, theirs = loss(dense=0), output(maps(1, CHANNELS, 1)), teacher(maps(2, THEIRS, 1), affine)
    both = built(held, theirs, batch_of(boxes(near, far), affine=affine))
    assert floats(both) == pytest.approx(floats(built(held, theirs, batch_of(boxes(near), affine=affine))), abs=1e-6)


def test_frames_without_boxes_give_zeros() -> None:
    terms = loss()(output(maps(1, CHANNELS)), teacher(maps(2, THEIRS)), batch_of(boxes(), boxes()))
    assert floats(terms) == {"dense": 0.0, "contrast": 0.0}
