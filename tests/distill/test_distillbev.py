"""DistillBEV: closed forms, since its released code needs boxes and networks of its own framework."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bevkd.distill.distillbev import Config, DistillBEV, attention, build, foreground_scale
from bevkd.geometry.boxes import points_in_boxes
from bevkd.types import Boxes
from tests.distill.kit import CHANNELS, GRID, THEIRS, batch_of, boxes, context, floats, maps, output, teacher

ALL = torch.ones(2, 1, 16, 16, dtype=torch.bool)


def loss(**config: object) -> DistillBEV:
    torch.manual_seed(0)
    built = build(Config.model_validate(config), context())
    assert isinstance(built, DistillBEV)
    return built


def annotated() -> tuple[Boxes, Boxes]:
    return boxes((0.2, -1.1, 5, 2, 0.6, 0), (7.4, 7.6, 3, 3, 0.2, 1)), boxes((-3.3, 2.2, 4.5, 1.8, -2, 0))


def test_a_cell_whose_centre_lies_in_a_box_weighs_the_root_of_its_share() -> None:
    found, cells = foreground_scale(annotated(), GRID), GRID.centers().flatten(0, 1)
    points = torch.cat([cells, torch.zeros(len(cells), 1)], dim=1)
    for frame, each in enumerate(annotated()):
        inside = points_in_boxes(points, each.values)
        share = (1 / (each.values[:, 3] * each.values[:, 4])).sqrt()
        expected = torch.where(inside, share[:, None], 0.0).amax(dim=0)
        torch.testing.assert_close(found[frame].flatten(), expected)


def test_a_box_smaller_than_a_cell_holds_the_cell_of_its_centre() -> None:
    scale = foreground_scale((boxes((0.1, 0.1, 0.5, 0.5, 0, 1)),), GRID)
    assert scale.nonzero().tolist() == [[0, 8, 8]]
    assert scale[0, 8, 8].item() == pytest.approx(2.0)


def test_attention_has_the_mean_one_over_what_is_covered() -> None:
    held, covered = maps(1, THEIRS)["bev_high"], ALL.clone()
    covered[1, :, :8] = False
    spatial, channels = attention(torch.where(covered, held, 0.0), covered, 0.5)
    torch.testing.assert_close(spatial.sum(dim=(1, 2)) / covered.sum(dim=(1, 2, 3)), torch.ones(2))
    assert float(spatial[1, :8].abs().max()) == 0
    torch.testing.assert_close(channels.mean(dim=1), torch.ones(2))
    strength = held[0].abs().mean(dim=0)
    torch.testing.assert_close(spatial[0], (strength.flatten() / 0.5).softmax(0).view(16, 16) * 256)


def test_the_terms_are_sums_over_their_own_cells() -> None:
    built, student, theirs = loss(spatial=0, channel=0), maps(1, CHANNELS), maps(2, THEIRS)
    theirs["heatmap"] = torch.full_like(theirs["heatmap"], -9.0)
    theirs["heatmap"][0, 2, 14, 1:4] = 2.0
    terms = built(output(student), teacher(theirs), batch_of(*annotated()))
    spatial, channels = attention(theirs["bev_high"], ALL, 0.5)
    error = (built.adapter(student["bev_high"]) - theirs["bev_high"]).square() * channels[:, :, None, None]
    error = error.sum(dim=1) * spatial
    scale = foreground_scale(annotated(), GRID)
    rest = scale == 0
    rest[0, 14, 1:4] = False
    background = sum((error[frame][rest[frame]].mean() for frame in range(2)), torch.zeros(())) / 2
    expected = {
        "foreground": 1.5e-3 * (error * scale).sum() / 2,
        "background": 4e-2 * background,
        "false_positive": 4e-2 * error[0, 14, 1:4].mean() / 2,
    }
    assert floats(terms) == pytest.approx(floats(expected), rel=1e-4)


def test_what_the_teacher_finds_at_an_annotation_is_no_false_positive() -> None:
    built, theirs = loss(), maps(2, THEIRS)
    theirs["heatmap"] = torch.full_like(theirs["heatmap"], -9.0)
    theirs["heatmap"][0, 0, 5:8, 7:10] = 2.0
    terms = built(output(maps(1, CHANNELS)), teacher(theirs), batch_of(*annotated()))
    assert terms["false_positive"].item() == 0


def test_without_labels_the_teachers_finds_are_apart_from_the_background() -> None:
    built, theirs = loss(), maps(2, THEIRS)
    batch = batch_of(boxes(), boxes(), labelled=False)
    terms = floats(built(output(maps(1, CHANNELS)), teacher(theirs), batch))
    assert terms["foreground"] == 0
    assert terms["false_positive"] > 0
    assert all(math.isfinite(value) for value in terms.values())


def test_mean_maps_and_mean_channels_are_compared_absolutely() -> None:
    built, student, theirs = loss(foreground=0, background=0, false_positive=0), maps(1, CHANNELS), maps(2, THEIRS)
    built.spatial = nn.Conv2d(1, 1, 1)
    terms = built(output(student), teacher(theirs), batch_of(*annotated()))
    own = built.adapter(student["bev_high"])
    cells = built.spatial(own.mean(dim=1, keepdim=True)) - theirs["bev_high"].mean(dim=1, keepdim=True)
    channels = own.mean(dim=(2, 3)) - theirs["bev_high"].mean(dim=(2, 3))
    expected = {"spatial": 2.5e-3 * cells.abs().sum() / 2, "channel": 0.25 * channels.abs().sum() / 2}
    assert floats(terms) == pytest.approx(floats(expected), rel=1e-4)
