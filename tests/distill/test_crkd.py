"""The affinity of CRKD: closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from bevkd.distill.crkd import CRKD, Config, affinity_loss, build
from bevkd.geometry.affine import BEVAffine
from tests.distill.kit import CHANNELS, THEIRS, batch_of, boxes, context, maps, output, teacher


def test_the_affinity_is_the_scalar_product_of_every_two_cells() -> None:
    student, theirs = torch.tensor([[1.0, 2.0], [0.0, 1.0]])[None, :, None], torch.zeros(1, 3, 1, 2)
    # Products of (1, 0) and (2, 1): 1, 2, 2, 5.
    assert affinity_loss(student, theirs).item() == pytest.approx(10 / 4)


def test_turning_all_features_changes_no_affinity() -> None:
    held = maps(0, CHANNELS)["bev_low"][..., :4, :4]
    turn = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(1)))[0]
    assert affinity_loss(held, torch.einsum("cd,bdyx->bcyx", turn, held)).item() == pytest.approx(0, abs=1e-5)


def test_resolutions_add_up() -> None:
    loss = build(Config(affinity=0.5, sizes=(8, 4)), context())
    assert isinstance(loss, CRKD)
    loss.adapters = nn.ModuleList([nn.Sequential(), nn.Sequential()])
    student, theirs = maps(1, CHANNELS), maps(2, THEIRS)
    found = loss(output(student), teacher(theirs), batch_of(boxes(), boxes()))["affinity"]
    pairs = [
        [functional.interpolate(held["bev_low"], (size, size), mode="bilinear") for held in (student, theirs)]
        for size in (8, 4)
    ]
    torch.testing.assert_close(found, 0.5 * sum(affinity_loss(own, known) for own, known in pairs))


def test_a_teacher_that_is_nowhere_near_gives_the_affinity_of_zeros() -> None:
    affine = BEVAffine(translation_m=(40.0, 0.0, 0.0))
    loss = build(Config(sizes=(4,)), context())
    assert isinstance(loss, CRKD)
    loss.adapters = nn.ModuleList([nn.Sequential()])
    batch = batch_of(boxes(), boxes(), affine=affine)
    assert loss(output(maps(1, CHANNELS)), teacher(maps(2, THEIRS), affine), batch)["affinity"].item() == 0
