"""Images with masks, from a world and from tables as nuImages has them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from bevkd.data.augment import ImageAugment
from bevkd.data.images import ImageView
from bevkd.data.instances import (
    ImageDataset,
    ImageSource,
    InstanceDataConfig,
    InstanceDataset,
    collate_images,
    open_images,
)
from bevkd.errors import DataError
from tests.geometry.kit import paste

H, W = 90, 160
COLORS = {"vehicle.car": (255, 0, 0), "human.pedestrian.adult": (0, 255, 0), "vehicle.ego": (0, 0, 255)}
"""Colour that the tables' images show each category in, on black."""


def rle(mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": base64.b64encode(code["counts"]).decode()}


def annotation(image: str, category: str, mask: np.ndarray | None) -> dict[str, Any]:
    return {
        "token": f"{image}-{category}",
        "sample_data_token": image,
        "category_token": category,
        "attribute_tokens": [],
        "bbox": [0, 0, 1, 1],  # nuImages' convention of the last pixel is not relied upon
        "mask": None if mask is None else rle(mask),
    }


@pytest.fixture
def nuimages(tmp_path: Path) -> Path:
    """Return two samples in the layout of nuImages: one key camera image each, sweeps beside it, and no scenes."""
    masks = {name: np.zeros((H, W), dtype=bool) for name in COLORS}
    masks["vehicle.car"][30:60, 20:70] = True
    masks["vehicle.car"][30:40, 20:30] = False
    masks["human.pedestrian.adult"][20:70, 100:112] = True
    masks["vehicle.ego"][80:] = True
    folder = tmp_path / "v1.0-mini"
    for path in (folder, tmp_path / "samples" / "CAM_FRONT"):
        path.mkdir(parents=True)
    pixels = np.zeros((H, W, 3), dtype=np.uint8)
    for name, mask in masks.items():
        pixels[mask] = COLORS[name]
    data, objects = [], []
    for index, token in enumerate(("late", "early")):
        name = f"samples/CAM_FRONT/{token}.png"
        Image.fromarray(pixels if token == "late" else np.zeros_like(pixels)).save(tmp_path / name)
        for key in (True, False):
            data.append(
                {
                    "token": token if key else f"{token}-sweep",
                    "sample_token": f"sample-{token}",
                    "filename": name,
                    "timestamp": 100 - index,
                    "is_key_frame": key,
                    "height": H,
                    "width": W,
                }
            )
    objects += [annotation("late", name, mask) for name, mask in masks.items()]
    objects += [
        annotation("late", "vehicle.truck", None),
        annotation("late-sweep", "vehicle.car", masks["vehicle.car"]),
    ]
    categories = [{"token": name, "name": name} for name in (*COLORS, "vehicle.truck")]
    samples = [{"token": f"sample-{token}", "key_camera_token": token} for token in ("late", "early")]
    tables = {"category": categories, "sample": samples, "sample_data": data, "object_ann": objects}
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def source(root: Path, **changes: Any) -> ImageSource:
    return open_images(InstanceDataConfig.model_validate({"root": root, "version": "v1.0-mini", **changes}))


def test_nuimages_gives_its_key_images_by_time_with_the_masks_of_detection_classes(nuimages: Path) -> None:
    images = source(nuimages)
    assert images.tokens == ("early", "late")
    assert images.check() == []
    assert len(images.instances("early")) == 0
    found = images.instances("late")
    assert [images.classes[label] for label in found.labels.tolist()] == ["car", "pedestrian"]
    assert found.boxes.tolist() == [[20, 30, 70, 60], [100, 20, 112, 70]]
    assert int(found.masks[0].sum()) == 30 * 50 - 100


def test_only_wanted_classes_are_there_and_labels_follow_their_order(nuimages: Path) -> None:
    found = source(nuimages, classes=("pedestrian", "car")).instances("late")
    assert found.labels.tolist() == [1, 0]
    assert len(source(nuimages, classes=("bus",)).instances("late")) == 0


@pytest.mark.parametrize("position", range(6))
def test_an_augmented_view_shows_each_object_where_its_mask_says(nuimages: Path, position: int) -> None:
    augment = ImageAugment(zoom=(1.0, 1.5), shift=True, flip=True)
    dataset = InstanceDataset(source(nuimages), 96, 192, augment, seed=3)
    sample = dataset[position]
    if sample.token == "early":
        assert len(sample.instances) == 0
        return
    channel = {"car": 0, "pedestrian": 1}
    whole = paste(sample.instances, 96, 192)
    for mask, label in zip(whole, sample.instances.labels.tolist(), strict=True):
        shown = sample.image[channel[dataset.source.classes[label]]] > 127
        assert int((mask & shown).sum()) > 0.97 * int((mask | shown).sum())


def test_small_objects_are_not_learned_but_stay_in_the_source(nuimages: Path) -> None:
    images = source(nuimages, min_area_px=1000)
    assert len(images.instances("late")) == 2
    dataset = InstanceDataset(images, 96, 192, ImageAugment(), seed=0)
    late = next(sample for sample in (dataset[0], dataset[1]) if sample.token == "late")
    assert late.instances.labels.tolist() == [0]


def test_a_sample_is_a_function_of_seed_and_position(nuimages: Path) -> None:
    augment = ImageAugment(zoom=(1.0, 1.5), shift=True, flip=True, brightness=(0.5, 1.5))
    first, again, other = (InstanceDataset(source(nuimages), 96, 192, augment, seed)[5] for seed in (1, 1, 2))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.view_from_original, again.view_from_original)
    assert not torch.equal(first.view_from_original, other.view_from_original)


def test_a_batch_numbers_its_images(nuimages: Path) -> None:
    dataset = InstanceDataset(source(nuimages), 96, 192, ImageAugment(), seed=0)
    samples = [dataset[position] for position in range(4)]
    batch = collate_images(samples).to("cpu")
    assert len(batch) == 4
    for number, sample in enumerate(samples):
        assert int((batch.instances.cameras == number).sum()) == len(sample.instances)


def test_evaluation_sees_the_whole_width(nuimages: Path) -> None:
    images = source(nuimages)
    sample = ImageDataset(images, images.tokens, 96, 192)[1]
    assert torch.equal(sample.view_from_original, ImageView.cover((H, W), 96, 192).matrix())
    assert sample.image.shape == (3, 96, 192)


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("object_ann", None, "it lacks:\n  - object_ann.json"),
        ("object_ann", "[{", "object_ann.json: is not a JSON list"),
        ("object_ann", '[{"token": "x"}]', "no field 'sample_data_token'"),
        ("sample_data", "[]", "no key camera image is left"),
    ],
)
def test_damaged_tables_are_named(nuimages: Path, table: str, content: str | None, message: str) -> None:
    path = nuimages / "v1.0-mini" / f"{table}.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="(?s)" + message.replace("[", r"\[")):
        source(nuimages)


def test_a_mask_that_is_no_base64_is_named(nuimages: Path) -> None:
    path = nuimages / "v1.0-mini" / "object_ann.json"
    rows = json.loads(path.read_text())
    rows[1]["mask"]["counts"] = "{}"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"the mask of 'late-human\.pedestrian\.adult' is no base64"):
        source(nuimages)


def test_a_missing_image_is_named(nuimages: Path) -> None:
    (nuimages / "samples" / "CAM_FRONT" / "late.png").unlink()
    (fault,) = source(nuimages).check()
    assert fault.endswith("late.png: missing")


def test_a_split_that_is_not_there_is_refused(nuimages: Path) -> None:
    with pytest.raises(DataError, match=r"unknown split 'train'; .* has: none\. Set data\.split"):
        source(nuimages, split="train")


def test_unknown_classes_are_refused(nuimages: Path) -> None:
    with pytest.raises(ValidationError, match="unknown classes unicorn"):
        source(nuimages, classes=("unicorn",))
