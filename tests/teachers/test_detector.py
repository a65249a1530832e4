"""A detector as teacher, in full and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bevkd.cache.arrays import sample_shapes_of
from bevkd.cache.spec import load_spec
from bevkd.data.collate import Batch
from bevkd.errors import CacheSpecError, ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.teachers.base import Teacher
from bevkd.teachers.detector import Config, build
from bevkd.types import Boxes, Signals
from tests.pipeline.kit import CLASSES, TEACHER


def teacher(**changes: Any) -> Teacher:
    config = Config.model_validate({"name": "detector", "detector": TEACHER, **changes})
    return build(config, CLASSES, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return two frames of points over the whole grid."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([50.0, 50.0, 4.0, 255.0, 0.0])
    points = (torch.rand(8000, 5, generator=generator) - torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0])) * spread
    frame = torch.arange(8000) % 2
    order = frame.argsort(stable=True)
    affines = (BEVAffine.identity(),) * 2
    none = (Boxes.empty(), Boxes.empty())
    labelled = torch.zeros(2, dtype=torch.bool)
    return Batch(("a", "b"), none, labelled, affines, points=points[order], point_frame=frame[order])


@pytest.fixture(scope="module")
def exact(batch: Batch) -> Signals:
    return teacher().infer(batch)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_gives_nearly_the_same_maps(
    batch: Batch, exact: Signals, precision: str, tolerance: float
) -> None:
    half = teacher(precision=precision).infer(batch)
    assert torch.equal(half.need("bev_low"), exact.need("bev_low"))  # sparse convolutions stay exact
    for name in ("bev_high", "heatmap", "box_code"):
        ours, full = half.need(name).float(), exact.need(name)
        assert half.need(name).dtype == getattr(torch, precision)
        assert 0 < float((ours - full).norm() / full.norm()) < tolerance


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_boxes_are_decoded_in_float32_whatever_the_precision(batch: Batch, precision: str) -> None:
    signals = teacher(precision=precision).infer(batch)
    assert signals.boxes is not None
    for boxes in signals.boxes:
        assert len(boxes) > 0
        assert boxes.values.dtype == boxes.scores.dtype == torch.float32


def test_the_precision_is_part_of_who_the_teacher_is() -> None:
    assert teacher().identity.preprocessing["precision"] == "float32"
    assert teacher(precision="bfloat16").identity.fingerprint != teacher().identity.fingerprint


def test_a_precision_that_does_not_exist_is_refused() -> None:
    from bevkd.config import parse

    with pytest.raises(ConfigError, match="float32"):
        parse(Config, {"name": "detector", "detector": TEACHER, "precision": "int8"}, "recipe")


# ------------------------------------------------------------------------------------------ pillars

PILLARS = {
    **TEACHER,
    "encoder": {"name": "pillar", "pillar_m": TEACHER["grid"]["cell_m"] / 2, "channels": [8]},
    "bev_encoder": {"layers": [0, 0], "strides": [1, 2], "channels": [8, 8], "up_channels": [8, 8]},
}


def test_a_map_that_is_finer_than_the_grid_is_no_signal(batch: Batch) -> None:
    pillars = teacher(detector=PILLARS)
    signals = pillars.infer(batch)
    assert signals.bev_low is None
    assert set(pillars.shapes) == {"bev_high", "heatmap", "box_code"}
    for name, shape in pillars.shapes.items():
        assert signals.need(name).shape[1:] == shape


def test_a_spec_that_wants_that_map_is_refused_with_the_reason() -> None:
    pillars = teacher(detector=PILLARS)
    reasons = getattr(pillars, "absent", None)
    with pytest.raises(
        CacheSpecError, match=r"bev_low needs bev_low \(each cell of the grid has 2 x 2 of the encoder's"
    ):
        sample_shapes_of(load_spec("unidistill"), pillars.shapes, "detector", reasons)
    sample_shapes_of(load_spec("pillars"), pillars.shapes, "detector", reasons)


def test_pillars_as_large_as_cells_write_the_map(batch: Batch) -> None:
    encoder = {"name": "pillar", "pillar_m": TEACHER["grid"]["cell_m"], "channels": [8]}
    pillars = teacher(detector={**PILLARS, "encoder": encoder})
    assert pillars.infer(batch).need("bev_low").shape[1:] == pillars.shapes["bev_low"]
    sample_shapes_of(load_spec("unidistill"), pillars.shapes, "detector")
