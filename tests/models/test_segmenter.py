"""The segmenter as a whole: sizes, faults of its config, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bevkd.errors import ConfigError
from bevkd.models.segmenter import Segmenter, SegmenterConfig
from bevkd.models.weights import load_weights, save_weights

CLASSES = ("car", "pedestrian")


def config(**changes: Any) -> SegmenterConfig:
    options = {
        "embedding_size": 16,
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2"],
    }
    values = {
        "backbone": {"options": options},
        "image_height": 64,
        "image_width": 96,
        "neck_channels": 8,
        "head": {"channels": 16, "layers": 1, "score_threshold": 0.0, "max_instances": 9},
    }
    return SegmenterConfig.model_validate({**values, **changes})


@pytest.mark.parametrize(("stride", "fineness"), [(4, 2), (8, 4), (4, 1)])
def test_maps_have_the_stride_of_the_head_and_masks_are_finer(stride: int, fineness: int) -> None:
    head = {"channels": 16, "fineness": fineness, "mask_channels": 5}
    segmenter = Segmenter(config(stride=stride, head=head), CLASSES).eval()
    output = segmenter(torch.zeros(3, 3, 64, 96, dtype=torch.uint8))
    assert output.heatmap.shape == (3, 2, 64 // stride, 96 // stride)
    assert output.mask_map.shape == (3, 5, 64 * fineness // stride, 96 * fineness // stride)


def test_an_image_is_segmented_alike_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter(config(), CLASSES).eval()
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    together = segmenter.head.decode(segmenter(images))
    alone = segmenter.head.decode(segmenter(images[1:2]))
    own = together[together.cameras == 1]
    assert len(own) == len(alone) > 3
    assert torch.equal(own.boxes, alone.boxes)
    assert torch.allclose(own.scores, alone.scores, atol=1e-5)


def test_its_weights_load_into_another_and_give_the_same(tmp_path: Path) -> None:
    first, second = Segmenter(config(), CLASSES).eval(), Segmenter(config(), CLASSES).eval()
    save_weights(tmp_path / "model.safetensors", first.state_dict(), {})
    load_weights(tmp_path / "model.safetensors", second)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(first(images).heatmap, second(images).heatmap)


def test_all_faults_of_the_strides_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"stride is 2, the backbone's stages have 4, 8; head\.fineness is 4"):
        Segmenter(config(stride=2, head={"fineness": 4}), CLASSES)


def test_the_size_of_the_view_must_fit_the_strides() -> None:
    with pytest.raises(ValidationError, match="multiple of 32"):
        config(image_height=100)
