"""What is stored of a frame, and that every cell a loss may read is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevkd.cache.arrays import sample_shapes_of
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec
from bevkd.distill.unidistill import foreground_mask
from bevkd.errors import CacheSpecError
from bevkd.geometry.affine import BEVAffine, warp_cells
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.sampling import foreground_cells, sample_at
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, BoxPoints, Signals, SparseMap

GRID = BEVGrid(x_m=(-12, 12), y_m=(-12, 12), cell_m=0.6)
Y, X = GRID.shape


def boxes(count: int, seed: int = 0, size: tuple[float, float] = (4.5, 2.0)) -> Boxes:
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(count, 9)
    values[:, :2] = torch.rand(count, 2, generator=generator) * 20 - 10
    values[:, 3:6] = torch.tensor([*size, 1.7])
    values[:, 6] = torch.rand(count, generator=generator) * 6 - 3
    return Boxes(values, torch.zeros(count, dtype=torch.int64), torch.ones(count))


def spec(**signals: object) -> CacheSpec:
    return CacheSpec.model_validate({"name": "test", "signals": signals})


def written(**changes: object) -> Signals:
    generator = torch.Generator().manual_seed(1)
    values: dict[str, object] = {
        "bev_low": torch.randn(2, 3, Y, X, generator=generator),
        "heatmap": torch.full((2, 3, Y, X), -8.0),
        "box_code": torch.randn(2, 2, 10, Y, X, generator=generator),
        "boxes": (boxes(2, 5), boxes(3, 6)),
    }
    return Signals(**(values | changes))  # type: ignore[arg-type]


def test_maps_and_boxes_are_those_of_the_frame() -> None:
    signals = written()
    sample = stored_signals(
        signals, (None, None), spec(bev_low={"encoding": "root8"}, boxes={"encoding": "boxes"}), GRID, 1
    )
    assert set(sample) == {"bev_low", "boxes"}
    assert signals.bev_low is not None
    assert torch.equal(sample["bev_low"], signals.bev_low[1])  # type: ignore[arg-type]
    assert len(sample["boxes"]) == 3  # type: ignore[arg-type]


def test_points_are_the_map_sampled_at_the_annotated_boxes() -> None:
    signals, annotated = written(), boxes(4)
    sample = stored_signals(signals, (None, annotated), spec(points_low={"encoding": "float16"}), GRID, 1)["points_low"]
    assert isinstance(sample, BoxPoints)
    assert signals.bev_low is not None
    points = nine_points(annotated.values[:, :7])
    assert torch.equal(sample.values, sample_at(signals.bev_low[1:], [points], GRID))
    assert torch.equal(sample.boxes, annotated.values[:, :7])


def test_a_frame_without_annotations_stores_no_points() -> None:
    sample = stored_signals(written(), (None, None), spec(points_low={"encoding": "float16"}), GRID, 0)["points_low"]
    assert len(sample) == 0  # type: ignore[arg-type]


def test_sparse_keeps_likely_cells_and_those_around_annotated_and_found_boxes() -> None:
    heatmap = torch.full((2, 3, Y, X), -8.0)
    heatmap[0, 2, 0, 0] = 3.0
    signals = written(heatmap=heatmap, boxes=(Boxes.empty(), Boxes.empty()))
    described = spec(box_code={"encoding": "sparse", "threshold": 0.5})
    annotated = boxes(1)
    sample = stored_signals(signals, (annotated, None), described, GRID, 0)["box_code"]
    assert isinstance(sample, SparseMap)
    wanted = foreground_cells(annotated, GRID)
    wanted[0, 0] = True
    assert torch.equal(sample.known, wanted)
    assert not sample.values[:, :, ~wanted].any()
    unsure = Boxes(annotated.values, annotated.labels, torch.tensor([0.4]))
    for found, kept in ((annotated, True), (unsure, False)):
        signals = written(boxes=(found, Boxes.empty()))
        sample = stored_signals(signals, (None, None), described, GRID, 0)["box_code"]
        assert isinstance(sample, SparseMap)
        assert bool(sample.known.any()) is kept


def test_a_signal_that_the_teacher_did_not_write_is_refused_with_the_way_out() -> None:
    with pytest.raises(CacheSpecError, match=r"wrote no bev_high, which points_high is stored from. Remove"):
        stored_signals(written(), (None, None), spec(points_high={"encoding": "root8"}), GRID, 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([(0.5, 0.5), (4.5, 2.0), (18.0, 3.0)]),
    turn=st.floats(-math.pi, math.pi),
    scale=st.floats(2 / 3, 1.3),
    shift=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    flips=st.tuples(st.booleans(), st.booleans()),
)
def test_no_augmentation_makes_a_loss_read_a_cell_that_was_not_kept(
    seed: int,
    size: tuple[float, float],
    turn: float,
    scale: float,
    shift: tuple[float, float],
    flips: tuple[bool, bool],
) -> None:
    affine = BEVAffine(*flips, rotation_rad=turn, scale=scale, translation_m=(*shift, 0.0))
    annotated = boxes(5, seed, size)
    known = foreground_cells(annotated, GRID)
    everywhere = torch.ones_like(known)
    covered, kept = (warp_cells(cells[None], (affine,), GRID)[0, 0] for cells in (everywhere, known))
    read = foreground_mask((affine.apply_to_boxes(annotated),), GRID)[0] > 0
    assert not (read & covered & ~kept).any()


@pytest.mark.parametrize(
    ("signals", "fault"),
    [
        ({"points_high": {"encoding": "root8"}}, "signals.points_high needs bev_high"),
        ({"instances": {"encoding": "masks"}}, "signals.instances needs instances"),
        ({"box_code": {"encoding": "sparse"}}, "signals.box_code needs box_code and heatmap"),
    ],
)
def test_a_spec_that_does_not_fit_its_teacher_is_refused_before_work(signals: dict[str, object], fault: str) -> None:
    with pytest.raises(CacheSpecError, match=fault):
        sample_shapes_of(spec(**signals), {"bev_low": (3, Y, X)}, "camera")


def test_points_take_their_channels_from_their_map() -> None:
    shapes = sample_shapes_of(
        spec(points_low={"encoding": "root8"}, boxes={"encoding": "boxes"}), {"bev_low": (3, Y, X)}, "t"
    )
    assert shapes == {"points_low": (9, 3)}
