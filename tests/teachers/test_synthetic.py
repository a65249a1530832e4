"""The made-up teacher."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bevkd.data.collate import Batch
from bevkd.models.heads.center import decode_boxes
from bevkd.teachers.base import Teacher
from bevkd.teachers.synthetic import Config, build
from bevkd.types import Boxes, Signals

CLASSES = ("car", "truck", "pedestrian")
GRID = {"x_m": [-9.6, 9.6], "y_m": [-19.2, 19.2], "cell_m": 0.8}
MAPS = ("bev_low", "bev_high", "heatmap", "box_code")


def teacher(**changes: Any) -> Teacher:
    values = {"grid": GRID, "bev_low": 16, "bev_high": 24, "tasks": 2, **changes}
    return build(Config.model_validate({"name": "synthetic", **values}), CLASSES, torch.device("cpu"))


def infer(teacher: Teacher, *tokens: str) -> Signals:
    none = torch.zeros(len(tokens), dtype=torch.bool)
    return teacher.infer(Batch(tokens, tuple(Boxes.empty() for _ in tokens), none, ()))


def test_signals_depend_on_the_token_alone() -> None:
    together, alone, other = infer(teacher(), "a", "b"), infer(teacher(), "b"), infer(teacher(seed=1), "b")
    for name in MAPS:
        assert torch.equal(together.need(name)[1], alone.need(name)[0])
        assert not torch.equal(together.need(name)[0], together.need(name)[1])
        assert not torch.equal(alone.need(name), other.need(name))
    assert together.boxes is not None
    assert alone.boxes is not None
    assert torch.equal(together.boxes[1].pack(), alone.boxes[0].pack())


def test_signals_have_the_shapes_that_the_teacher_promises() -> None:
    made = teacher()
    signals = infer(made, "a", "b")
    assert {name: tuple(signals.need(name).shape[1:]) for name in MAPS} == dict(made.shapes)


def test_maps_are_as_sparse_as_those_of_a_lidar_network_after_relu() -> None:
    signals = infer(teacher(occupied=0.2), "a")
    low, high = signals.need("bev_low"), signals.need("bev_high")
    assert float(low.min()) == 0
    assert 0.15 < float((low.amax(dim=1) > 0).float().mean()) < 0.25
    assert 0.07 < float((low > 0).float().mean()) < 0.13
    assert float((high > 0).float().mean()) > float((low > 0).float().mean())


def test_boxes_stand_where_heatmap_and_box_code_say() -> None:
    made = teacher(boxes=1)
    signals = infer(made, "a")
    assert signals.boxes is not None
    box = signals.boxes[0]
    cell = made.grid.to_cells(box.center[:, 0:2]).long().flip(-1)
    row, column = cell[0].tolist()
    code = signals.need("box_code")[0, int(box.labels[0]) % 2, :, row, column]
    torch.testing.assert_close(decode_boxes(code[None], cell, made.grid), box.values, rtol=1e-4, atol=1e-4)
    logit = signals.need("heatmap")[0, int(box.labels[0]), row, column]
    assert float(logit.sigmoid()) == pytest.approx(float(box.scores[0]), abs=2e-3)


def test_a_batch_takes_at_least_the_time_that_was_asked_for() -> None:
    started = time.perf_counter()
    infer(teacher(seconds_per_frame=0.1), "a", "b")
    assert 0.2 <= time.perf_counter() - started < 0.4


def test_its_identity_says_that_it_knows_nothing_and_not_how_slow_it_is() -> None:
    slow = teacher(seconds_per_frame=3)
    assert "MADE UP" in slow.identity.origin
    assert slow.identity == teacher().identity
    assert slow.identity != teacher(seed=1).identity


def test_it_reads_points_only_on_demand() -> None:
    assert teacher().view.sensors == frozenset()
    assert teacher(lidar=True).view.sensors == {"lidar"}
