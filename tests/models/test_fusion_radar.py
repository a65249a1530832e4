"""Encoders of two sensors, and of radar."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.models.detector import Detector, DetectorConfig, view_of
from tests.models.test_detector import CLASSES, LIDAR, batch, values

CAMERA = values()["encoder"]
FUSION = {"name": "fusion", "camera": CAMERA, "lidar": LIDAR, "channels": 6}
RADAR = {"name": "radar", "channels": [4, 8], "max_points": 5}


def detector(encoder: dict[str, Any], **changes: Any) -> Detector:
    torch.manual_seed(0)
    return Detector(parse(DetectorConfig, values(encoder=encoder, **changes), "test"), CLASSES)


def with_radar(returns: int = 40) -> Batch:
    torch.manual_seed(0)
    radar = (torch.rand(returns, 7) - 0.5) * torch.tensor([15.0, 11, 2, 20, 20, 30, 1])
    return replace(batch(), radar=radar, radar_frame=torch.arange(returns) % 2)


def test_fusion_reads_both_sensors_and_what_its_camera_is_supervised_with() -> None:
    config = parse(DetectorConfig, values(encoder=FUSION), "test")
    assert config.sensors == {"camera", "lidar"}
    assert (view_of(config).image_height, view_of(config).image_width) == (32, 64)
    supervised = parse(DetectorConfig, values(encoder={**FUSION, "camera": {**CAMERA, "depth_weight": 1.0}}), "test")
    assert supervised.training_sensors == {"camera", "lidar", "lidar_depth"}


def test_fusion_depends_on_images_and_on_points() -> None:
    model, both = detector(FUSION).eval(), batch()
    assert both.images is not None
    assert both.points is not None
    plain = model(both).bev_low
    assert plain.shape == (2, 6, 12, 16)
    assert not torch.equal(plain, model(replace(both, images=255 - both.images)).bev_low)
    assert not torch.equal(plain, model(replace(both, points=both.points * 0.5)).bev_low)


def test_every_weight_of_fusion_and_of_radar_learns() -> None:
    for encoder in (FUSION, RADAR):
        model = detector(encoder).train()
        output = model(with_radar())
        (output.head.heatmap.square().sum() + output.head.box_code.square().sum()).backward()
        assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_radar_keeps_to_the_cells_of_its_returns() -> None:
    model, some = detector(RADAR).eval(), with_radar()
    assert some.radar is not None
    bev = model(some).bev_low
    assert bev.shape == (2, 8, 12, 16)
    cells = (some.radar[:, :2] - torch.tensor([-8.0, -6.0])).floor().long()
    occupied = torch.zeros(2, 12, 16, dtype=torch.bool)
    occupied[some.radar_frame, cells[:, 1], cells[:, 0]] = True
    assert not bev.abs().sum(1)[~occupied].any()
    assert (bev.abs().sum(1)[occupied] > 0).float().mean() > 0.9


@pytest.mark.parametrize("value", range(7))
def test_every_value_of_a_return_counts(value: int) -> None:
    model, some = detector(RADAR).eval(), with_radar()
    assert some.radar is not None
    changed = some.radar.clone()
    changed[:, value] += 0.1
    assert not torch.equal(model(some).bev_low, model(replace(some, radar=changed)).bev_low)


def test_frames_without_returns_give_an_empty_map() -> None:
    assert not detector(RADAR).eval()(with_radar(0)).bev_low.any()


def test_a_missing_sensor_is_named() -> None:
    with pytest.raises(ValueError, match="radar"):
        detector(RADAR)(batch())


def test_widths_make_every_part_narrower() -> None:
    wide = detector({**RADAR, "channels": [16, 32]})
    narrow = detector({**RADAR, "channels": [16, 32]}, widths={"encoder": 0.5, "bev_encoder": 1, "head": 1})
    assert (wide.encoder.out_channels, narrow.encoder.out_channels) == (32, 16)
