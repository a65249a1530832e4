"""Mask2Former as teacher: its labels, its weights, and where it puts what it sees."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from bevkd.data.collate import Batch
from bevkd.data.images import ImageView
from bevkd.errors import CheckpointError, ContractError
from bevkd.geometry.affine import BEVAffine
from bevkd.teachers import mask2former
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes

CLASSES = ("car", "truck", "pedestrian", "bicycle", "traffic_cone")
COCO = ("person", "bicycle", "car", "traffic light", "truck", "stop sign")
GRID = {"x_m": [-8, 8], "y_m": [-8, 8], "z_m": [-5, 3], "cell_m": 1.0}
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Mask2Former of random weights as ``save_pretrained`` writes it."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=dict(enumerate(COCO)),
        label2id={name: index for index, name in enumerate(COCO)},
    )
    path = tmp_path_factory.mktemp("hub") / "tiny"
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path


def teacher(folder: Path, classes: tuple[str, ...] = CLASSES, **changes: Any) -> Teacher:
    values = {"folder": folder, "grid": GRID, "image_height": HEIGHT, "image_width": WIDTH, "score_threshold": 0.0}
    config = mask2former.Config.model_validate({**values, **changes})
    return mask2former.build(config, classes, torch.device("cpu"))


def batch(view: ImageView, frames: int = 2, cameras: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (frames, cameras, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    return Batch(
        tokens=tuple("ab"[:frames]),
        boxes=(Boxes.empty(),) * frames,
        labelled=torch.zeros(frames, dtype=torch.bool),
        affines=(BEVAffine.identity(),) * frames,
        images=images,
        view_from_original=view.matrix().expand(frames, cameras, 3, 3),
    )


def copied(folder: Path, to: Path, change: Any) -> Path:
    """Return a copy of the folder whose tensors ``change`` has edited."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (COCO, {"person": "pedestrian", "bicycle": "bicycle", "car": "car", "truck": "truck"}),
        (("person", "rider", "car", "train"), {"person": "pedestrian", "car": "car"}),
        (("Car", "traffic cone", "sky"), {"Car": "car", "traffic cone": "traffic_cone"}),
        (
            ("human.pedestrian.adult", "human.pedestrian.child", "movable_object.trafficcone", "vehicle.bus.rigid"),
            {
                "human.pedestrian.adult": "pedestrian",
                "human.pedestrian.child": "pedestrian",
                "movable_object.trafficcone": "traffic_cone",
            },
        ),
    ],
)
def test_labels_of_public_data_sets_find_their_class(names: tuple[str, ...], expected: dict[str, str]) -> None:
    table = mask2former.class_of_labels(dict(enumerate(names)), CLASSES, {})
    found = {name: CLASSES[int(row.argmax())] for name, row in zip(names, table, strict=True) if row.any()}
    assert found == expected


def test_every_nuimages_category_of_a_detection_class_has_that_class() -> None:
    from nuscenes.eval.detection.utils import category_to_detection_name

    from bevkd.data.sources.nuscenes import CLASSES as NUSCENES
    from bevkd.world.tables import CATEGORIES

    table = mask2former.class_of_labels(dict(enumerate(CATEGORIES)), NUSCENES, {})
    for name, row in zip(CATEGORIES, table, strict=True):
        expected = category_to_detection_name(name)
        assert (NUSCENES[int(row.argmax())] if row.any() else None) == expected


def test_a_recipe_may_name_further_labels() -> None:
    table = mask2former.class_of_labels({0: "pylon", 1: "car"}, CLASSES, {"pylon": "traffic_cone"})
    assert table.argmax(dim=1).tolist() == [4, 0]


def test_labels_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ContractError, match=r"no label means a class; labels are sky, tree"):
        mask2former.class_of_labels({0: "sky", 1: "tree"}, CLASSES, {})
    with pytest.raises(ContractError, match=r"no label 'pylon'(?s:.)*labels.pylon: 'cone' is no class"):
        mask2former.class_of_labels({0: "car"}, CLASSES, {"pylon": "cone"})


# ---------------------------------------------------------------------------------------------- the teacher


def test_its_identity_says_what_it_cannot_know(folder: Path) -> None:
    identity = teacher(folder).identity
    assert identity.preprocessing["classes_absent"] == ["traffic_cone"]
    assert identity.preprocessing["labels"] == {
        "person": "pedestrian",
        "bicycle": "bicycle",
        "car": "car",
        "truck": "truck",
    }
    assert str(folder) not in identity.model_dump_json()
    assert identity == teacher(folder).identity


def test_it_finds_instances_in_every_camera_within_the_original_images(folder: Path) -> None:
    view = ImageView.cover((180, 240), HEIGHT, WIDTH)
    signals = teacher(folder).infer(batch(view))
    assert signals.instances is not None
    first, second = signals.instances
    assert set(first.cameras.tolist()) <= {0, 1, 2}
    assert len(set(second.cameras.tolist())) > 1
    for found in (first, second):
        assert len(found) > 3
        for mask, (left, top, right, bottom) in zip(found.masks, found.boxes.tolist(), strict=True):
            assert mask.shape == (bottom - top, right - left)
            assert 0 <= left < right <= 240
            assert 0 <= top < bottom <= 180


def test_the_same_images_give_the_same_instances(folder: Path) -> None:
    view = ImageView.cover((180, 240), HEIGHT, WIDTH)
    one, two = (teacher(folder).infer(batch(view)).instances for _ in range(2))
    assert one is not None
    assert two is not None
    assert torch.equal(one[0].boxes, two[0].boxes)
    assert torch.equal(one[1].scores, two[1].scores)


class Stub(nn.Module):
    """Two queries: a sure person in the upper left quarter, and a truck or car on the right half."""

    config = SimpleNamespace(id2label=dict(enumerate(("person", "child", "car", "truck"))))

    def forward(self, pixel_values: Tensor) -> Any:
        rows, columns = pixel_values.shape[2] // 4, pixel_values.shape[3] // 4
        masks = torch.full((len(pixel_values), 2, rows, columns), -20.0)
        masks[:, 0, : rows // 2, : columns // 2] = 20
        masks[:, 1, :, columns // 2 :] = 20
        # person 0.5 and child 0.4; car 0.3, truck 0.6; the rest is no object.
        p = torch.tensor([[0.5, 0.4, 1e-6, 1e-6, 0.1], [1e-6, 1e-6, 0.3, 0.6, 0.1]]).log()
        return SimpleNamespace(class_queries_logits=p.expand(len(pixel_values), 2, 5), masks_queries_logits=masks)


def test_scores_add_up_over_labels_of_a_class_and_masks_land_on_the_original(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    monkeypatch.setattr(mask2former, "_load", lambda _: (Stub(), normalisation))
    monkeypatch.setattr(mask2former, "_described", lambda _: {})
    labels = {"child": "pedestrian"}
    view = ImageView(HEIGHT, WIDTH, 0.5, top=16)  # the view begins at row 32 of a 256 x 192 original
    signals = teacher(folder, labels=labels, score_threshold=0.2).infer(batch(view, frames=1, cameras=1))
    assert signals.instances is not None
    (found,) = signals.instances
    assert [CLASSES[label] for label in found.labels.tolist()] == ["pedestrian", "truck", "car"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.3], abs=1e-2)
    assert found.boxes.tolist() == [[0, 32, 96, 96], [96, 32, 192, 160], [96, 32, 192, 160]]
    assert all(mask.float().mean() > 0.99 for mask in found.masks)  # corners are rounded when they are enlarged


# ---------------------------------------------------------------------------------------------- weights


def test_a_missing_an_extra_and_a_misshapen_tensor_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["class_predictor.bias"]
        tensors["intruder"] = torch.zeros(3)
        tensors["class_predictor.weight"] = torch.zeros(4, 32)

    with pytest.raises(CheckpointError) as refusal:
        teacher(copied(folder, tmp_path / "spoilt", spoil))
    for fault in ("missing: class_predictor.bias", "not in the model: intruder", "shape of class_predictor.weight"):
        assert fault in str(refusal.value)


def test_other_weights_are_another_teacher(folder: Path, tmp_path: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["class_predictor.bias"] += 1

    other = teacher(copied(folder, tmp_path / "other", nudge))
    assert other.identity.weights_sha256 != teacher(folder).identity.weights_sha256


def test_normalisation_comes_from_the_folder(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other", lambda _: None)
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    normalisation = teacher(other).identity.preprocessing["normalisation"]
    assert normalisation == {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.229, 0.224, 0.225]}


def test_a_folder_that_is_none_and_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks config\.json and model\.safetensors"):
        teacher(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds a 'resnet', not a Mask2Former"):
        teacher(tmp_path)
