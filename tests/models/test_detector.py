"""A detector is built from its config alone, and its start from its seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.types import Boxes

CLASSES = ("car", "pedestrian", "cone")


def values(**changes: Any) -> dict[str, Any]:
    camera = {
        "name": "lift_splat",
        "backbone": {
            "options": {
                "embedding_size": 4,
                "hidden_sizes": [4, 8],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2"],
            }
        },
        "image_height": 32,
        "image_width": 64,
        "stride": 8,
        "neck_channels": 4,
        "channels": 6,
        "depth": {"start": 1.0, "stop": 8.0, "step": 1.0},
    }
    return {
        "grid": {"x_m": [-8, 8], "y_m": [-6, 6], "cell_m": 1.0},
        "encoder": camera,
        "bev_encoder": {"layers": [1, 0], "strides": [1, 2], "channels": [4, 6], "up_channels": [3, 5]},
        "head": {"name": "center", "tasks": [["car"], ["pedestrian", "cone"]], "channels": 8},
        **changes,
    }


LIDAR = {"name": "voxel", "voxel_m": [0.25, 0.25, 0.4], "channels": [2, 4, 8], "blocks": 1, "out_channels": 4}


def detector(seed: int = 0, **changes: Any) -> Detector:
    torch.manual_seed(seed)
    return Detector(parse(DetectorConfig, values(**changes), "test"), CLASSES)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    pose = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    return Batch(
        tokens=("a", "b"),
        boxes=(Boxes.empty(), Boxes.empty()),
        labelled=torch.ones(2, dtype=torch.bool),
        affines=(BEVAffine.identity(), BEVAffine.identity()),
        points=(torch.rand(300, 5, generator=generator) - 0.5) * torch.tensor([16.0, 12, 4, 1, 1]),
        point_frame=torch.arange(300) % 2,
        images=torch.randint(0, 256, (2, 1, 3, 32, 64), generator=generator, dtype=torch.uint8),
        intrinsics=torch.tensor([[40.0, 0, 32], [0, 40, 16], [0, 0, 1]]).expand(2, 1, 3, 3),
        bev_from_camera=pose.expand(2, 1, 4, 4),
        view_from_original=torch.eye(3).expand(2, 1, 3, 3),
    )


@pytest.mark.parametrize(("encoder", "low_channels"), [(None, 6), (LIDAR, 8)], ids=["camera", "lidar"])
def test_the_three_parts_fit_whatever_the_sensor(encoder: dict[str, Any] | None, low_channels: int) -> None:
    model = detector(**({"encoder": encoder} if encoder else {}))
    output = model(batch())
    assert output.bev_low.shape == (2, low_channels, 12, 16)
    assert output.bev_high.shape == (2, 8, 12, 16)
    assert output.head.heatmap.shape == (2, 3, 12, 16)
    assert output.head.box_code.shape == (2, 2, 10, 12, 16)
    assert (model.encoder.out_channels, model.bev_encoder.out_channels) == (low_channels, 8)


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    first, again, other = (detector(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_same_weights_and_batch_give_the_same_bits() -> None:
    model = detector().eval()
    first, again = model(batch()), model(batch())
    assert torch.equal(first.head.heatmap, again.head.heatmap)
    assert torch.equal(first.head.box_code, again.head.box_code)


def test_every_weight_of_a_camera_detector_learns() -> None:
    model = detector()
    output = model(batch())
    (output.head.heatmap.square().sum() + output.head.box_code.square().sum()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_the_encoder_says_which_sensors_and_images_it_wants() -> None:
    camera = view_of(parse(DetectorConfig, values(), "test"))
    lidar = view_of(parse(DetectorConfig, values(encoder=LIDAR), "test"))
    assert (camera.sensors, camera.image_height, camera.image_width) == ({"camera"}, 32, 64)
    assert lidar.sensors == {"lidar"}


def test_faults_of_all_parts_are_reported_at_once_with_their_path() -> None:
    faulty = values(grid={"x_m": [-8, 8], "y_m": [6, -6], "cell_m": 1.0}, head={"name": "centre", "tasks": []})
    faulty["encoder"]["strid"] = 8
    faulty["encoder"]["channels"] = "many"
    with pytest.raises(ConfigError) as caught:
        parse(DetectorConfig, faulty, "a.yaml")
    message = str(caught.value)
    for part in ("grid", "y_m", "encoder.strid: unknown key", "encoder.channels", "head: unknown plug-in 'centre'"):
        assert part in message


def test_the_config_survives_its_own_dump() -> None:
    config = parse(DetectorConfig, values(), "test")
    assert parse(DetectorConfig, config.model_dump(mode="json"), "dump") == config
