"""RDD: closed forms (golden.md, section 2), since the paper has no public code."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.distill.rdd import RDD, Config, Regions, disparities, pooled, proposals, selection
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.models.heads import center
from bevkd.models.heads.center import HeadOutput
from bevkd.types import Boxes, Signals

GRID = BEVGrid(x_m=(-16, 16), y_m=(-16, 16), cell_m=1.0)
CLASSES = ("car", "pedestrian", "cone")
TASKS = (("car",), ("pedestrian", "cone"))
CHANNELS = 6
IDENTITY = BEVAffine.identity()


def loss(**config: Any) -> RDD:
    """Return the loss of a student with as many channels as its teacher; its adapter changes nothing."""
    head = center.build(center.Config(tasks=TASKS, channels=8), CHANNELS, GRID, CLASSES)
    part = SimpleNamespace(out_channels=CHANNELS)
    student = SimpleNamespace(head=head, config=SimpleNamespace(grid=GRID), encoder=part, bev_encoder=part)
    built = RDD(Config(**config), DistillContext(cast("Detector", student), {"bev_high": (CHANNELS, 32, 32)}))
    built.adapter = nn.Sequential()
    return built


def maps(seed: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heatmap = torch.full((batch, 3, 32, 32), -6.0)
    cells = torch.randint(3, 29, (batch, 3, 4, 2), generator=generator)
    for frame, label, cell in itertools.product(range(batch), range(3), range(4)):
        row, column = cells[frame, label, cell]
        heatmap[frame, label, row, column] = 1.0 + cell / 4
    code = torch.randn(batch, 2, 10, 32, 32, generator=generator) * 0.3
    code[:, :, 3:5] += 1.0
    return {
        "bev_high": torch.randn(batch, CHANNELS, 32, 32, generator=generator) * 3,
        "heatmap": heatmap,
        "box_code": code,
    }


def output(held: dict[str, Tensor]) -> DetectorOutput:
    return DetectorOutput(held["bev_high"], held["bev_high"], HeadOutput(held["heatmap"], held["box_code"]))


def run(
    student: dict[str, Tensor], teacher: dict[str, Tensor], affine: BEVAffine = IDENTITY, **config: Any
) -> dict[str, Tensor]:
    frames = len(student["heatmap"])
    affines = (affine,) * frames
    nothing = tuple(Boxes.empty() for _ in range(frames))
    batch = Batch(("a", "b")[:frames], nothing, torch.zeros(frames, dtype=torch.bool), affines)
    return loss(**config)(output(student), TeacherBatch(Signals(**teacher), affines, GRID), batch)


def disparity_of(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, count, generator=generator), torch.rand(2, count, generator=generator) > 0.2


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    terms = run(maps(0), maps(0), box=True)
    assert {name: value.item() for name, value in terms.items()} == {"feature": 0, "logit": 0}


def test_saturated_regions_are_as_far_apart_as_distributions_can_be() -> None:
    one, other = torch.zeros(1, 5, 3, 7, 7), torch.zeros(1, 5, 3, 7, 7)
    one[:, 0], other[:, 3] = 1000.0, 1000.0
    found = disparities(one, other, torch.ones(1, 3, 7, 7), 4.0)
    torch.testing.assert_close(found, torch.full((1, 3), math.sqrt(2 * 7 * 7)))


def test_without_threshold_every_region_that_differs_counts() -> None:
    disparity, found = disparity_of()
    disparity[0, :5] = 0
    chosen = selection(disparity, found, Config(disparity=0))
    assert torch.equal(chosen.bool(), found & (disparity > 0))


def test_fewer_regions_count_as_the_threshold_grows() -> None:
    disparity, found = disparity_of()
    counts = [int(selection(disparity, found, Config(disparity=each / 10)).sum()) for each in range(11)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[5] > counts[10] == 0


def test_the_rule_is_the_minimum_of_equation_5_with_disparity_for_information() -> None:
    disparity = torch.tensor([[0.03, 0.2, 0.1001, 0.0999, 0.7]])
    masks = torch.tensor([*itertools.product((0.0, 1.0), repeat=5)])
    best = masks[(masks * (0.1 - disparity)).sum(dim=1).argmin()]
    assert torch.equal(selection(disparity, torch.ones(1, 5, dtype=torch.bool), Config())[0], best)


def test_equation_5_to_the_letter_selects_nothing() -> None:
    information = torch.tensor([0.0, 0.3, 2.0])
    masks = torch.tensor([*itertools.product((0.0, 0.5, 1.0), repeat=3)])
    costs = (masks * information).sum(dim=1) + 0.1 * masks.abs().sum(dim=1)
    assert torch.equal(masks[costs.argmin()], torch.zeros(3))
    disparity, found = disparity_of()
    assert selection(disparity, found, Config(rule="published")).sum() == 0


def test_soft_selection_grows_from_the_threshold_on() -> None:
    disparity = torch.tensor([[0.05, 0.1, 0.15, 0.2, 0.9]])
    chosen = selection(disparity, torch.ones(1, 5, dtype=torch.bool), Config(rule="soft"))
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))


def test_topk_selects_the_share_with_the_greatest_disparity() -> None:
    disparity, found = disparity_of()
    chosen = selection(disparity, found, Config(rule="topk", share=0.25)).bool()
    assert chosen.sum() == math.ceil(0.25 * int(found.sum()))
    assert not chosen[~found].any()
    assert disparity[chosen].min() >= disparity[found & ~chosen].max()


def test_the_selection_carries_no_gradient() -> None:
    disparity, found = disparity_of()
    disparity.requires_grad_()
    for rule in ("hard", "soft", "topk"):
        assert not selection(disparity, found, Config(rule=rule)).requires_grad  # type: ignore[arg-type]


def test_proposals_are_the_peaks_of_both_and_of_all_classes() -> None:
    held = maps(3)
    regions = proposals(held["heatmap"], held["box_code"], torch.tensor([0, 1, 1]), GRID, Config())
    scores = held["heatmap"].sigmoid()
    peaks = (scores == nn.functional.max_pool2d(scores, 3, 1, 1)) & (scores > 0.1)
    for frame in range(2):
        wanted = {(x - 15.5, y - 15.5) for _, y, x in peaks[frame].nonzero().tolist()}
        kept = regions.center[frame][regions.found[frame]]
        assert {(x, y) for x, y in kept.tolist()} == wanted
        assert len(kept) == int(peaks[frame].sum())


def test_peaks_whose_box_the_cache_has_not_kept_are_no_proposals() -> None:
    held = maps(3)
    known = torch.zeros(2, 32, 32, dtype=torch.bool)
    known[:, :, 16:] = True
    task_of_class = torch.tensor([0, 1, 1])
    everything = proposals(held["heatmap"], held["box_code"], task_of_class, GRID, Config())
    kept = proposals(held["heatmap"], held["box_code"], task_of_class, GRID, Config(), known)
    assert torch.equal(kept.found, everything.found & (everything.center[..., 0] > 0))
    assert 0 < kept.found.sum() < everything.found.sum()


def test_pooling_a_rotated_region_reads_the_map_along_its_axes() -> None:
    """On a ramp along x, the mean over a cell of a region is the ramp at its centre, however the region lies."""
    centers = GRID.centers()
    ramp = centers[None, None, :, :, 0].clone()
    one = torch.tensor([[[2.0, -3.0]]])
    regions = Regions(
        one, torch.tensor([[[3.0, 1.0]]]), torch.tensor([[0.7]]), torch.zeros(1, 1).long(), one[..., 0] > 0
    )
    found = pooled(ramp, regions.positions(14), GRID)[0, 0, 0]
    torch.testing.assert_close(found, regions.positions(7)[0, 0, ..., 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("affine", [BEVAffine(flip_x=True), BEVAffine(flip_y=True, rotation_rad=math.pi / 2)])
@pytest.mark.parametrize("config", [{}, {"region": "box", "box": True}, {"logit_region": "peak"}])
def test_flips_and_quarter_turns_of_the_student_change_nothing(affine: BEVAffine, config: dict[str, Any]) -> None:
    student, teacher = maps(1), maps(2)
    moved = {
        name: torch.stack([affine.warp_map(each, GRID)[0] for each in student[name]])
        for name in ("bev_high", "heatmap")
    }
    moved["box_code"] = torch.stack([affine.warp_box_code(each, GRID)[0] for each in student["box_code"]])
    expected = run(student, teacher, **config)
    for name, value in run(moved, teacher, affine, **config).items():
        # The L1 distance of two values of a box code is not that of the turned pair.
        tolerance = 0.15 if "box" in config and name == "logit" else 1e-4
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-6)


def test_regions_beyond_the_teachers_map_are_left_out() -> None:
    """A student shifted off the map sees nothing of the teacher, and is asked for nothing."""
    terms = run(maps(1), maps(2), BEVAffine(translation_m=(40.0, 0.0, 0.0)))
    assert {name: value.item() for name, value in terms.items()} == {"feature": 0, "logit": 0}


def test_a_frame_without_peaks_gives_zero() -> None:
    student, teacher = maps(1), maps(2)
    student["heatmap"], teacher["heatmap"] = (
        torch.full_like(student["heatmap"], -9),
        torch.full_like(student["heatmap"], -9),
    )
    assert sum(value.item() for value in run(student, teacher).values()) == 0


def test_agreement_is_not_asked_for_again() -> None:
    """A region below the threshold gives the student no gradient; one above does."""
    student, teacher = maps(1), maps(1)
    teacher["bev_high"] = teacher["bev_high"] + 0.01
    student["bev_high"].requires_grad_()
    assert run(student, teacher)["feature"].item() == 0
    teacher["bev_high"][0, 0] += 20
    run(student, teacher)["feature"].backward()  # type: ignore[no-untyped-call]
    gradient = student["bev_high"].grad
    assert gradient is not None
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
