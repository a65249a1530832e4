"""Instance masks of camera images, from tables in nuImages format: nuImages itself, or a world."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bevkd.data.sources._nuscenes_select import custom_splits
from bevkd.data.sources._nuscenes_tables import records
from bevkd.errors import DataError, report

_NEEDED = ("category", "sample", "sample_data", "object_ann")


@dataclass(frozen=True)
class ImageTable:
    """Key camera images with their instances; those of an image are neighbours, and only those with a mask are here.

    Attributes:
        tokens: of the ``sample_data`` records, in the order of their time.
        files: of each image, relative to the root.
        sizes: (H, W) of each image, pixels.
        offsets: first instance of each image, and the end.
        labels: class of each instance.
        codes: run-length code of each instance's mask, as pycocotools takes it.
    """

    tokens: tuple[str, ...]
    files: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    codes: tuple[bytes, ...]


def read_image_table(tables: Path, split: str | None, classes: Sequence[str]) -> ImageTable:
    """Return the key camera images of a version and their instances of ``classes``.

    Args:
        tables: folder of the version.
        split: one of its ``splits.json``, which lists scenes; None takes all images of the version.

    Raises:
        DataError: a table is missing or damaged, the split is unknown, or nothing is left.
    """
    absent = [f"{name}.json" for name in _NEEDED if not (tables / f"{name}.json").is_file()]
    if absent:
        raise report(DataError, f"{tables} holds no instance masks in nuImages format; it lacks:", absent)
    try:
        images = _images(tables, split)
        labels, codes = _instances(tables, {image["token"]: row for row, image in enumerate(images)}, classes)
    except KeyError as error:
        raise DataError(
            f"a record in {tables} has no field {error}. Extract the metadata archive of this version again."
        ) from error
    if not images:
        raise DataError(f"no key camera image is left of split '{split}' in {tables}. Choose another split.")
    counts = [len(each) for each in labels]
    return ImageTable(
        tokens=tuple(image["token"] for image in images),
        files=tuple(image["filename"] for image in images),
        sizes=np.array([(image["height"], image["width"]) for image in images], dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=np.array([label for each in labels for label in each], dtype=np.int64),
        codes=tuple(code for each in codes for code in each),
    )


def _images(tables: Path, split: str | None) -> list[dict[str, Any]]:
    """Return the records of the key camera images, by time."""
    wanted = None if split is None else _samples(tables, split)
    images = [
        record
        for record in records(tables, "sample_data")
        # Only cameras have a size: nuImages has no other sensor, a world has LiDAR and radars too.
        if record["is_key_frame"] and record["height"] and (wanted is None or record["sample_token"] in wanted)
    ]
    return sorted(images, key=lambda record: (record["timestamp"], record["filename"]))


def _samples(tables: Path, split: str) -> set[str]:
    """Return the samples of the scenes of a split."""
    splits = custom_splits(tables)
    if split not in splits:
        known = ", ".join(splits) or "none"
        raise DataError(
            f"unknown split '{split}'; {tables / 'splits.json'} has: {known}. Set data.split to one of them, or to "
            "null for all images of the version: nuImages has a version for each split."
        )
    names = set(splits[split])
    scenes = {record["token"] for record in records(tables, "scene") if record["name"] in names}
    return {record["token"] for record in records(tables, "sample") if record["scene_token"] in scenes}


def _instances(
    tables: Path, row_of: dict[str, int], classes: Sequence[str]
) -> tuple[list[list[int]], list[list[bytes]]]:
    """Return labels and mask codes by image."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    names = {record["token"]: category_to_detection_name(record["name"]) for record in records(tables, "category")}
    labels: list[list[int]] = [[] for _ in row_of]
    codes: list[list[bytes]] = [[] for _ in row_of]
    for record in _wanted(tables, row_of):
        name = names[record["category_token"]]
        if name in classes:
            row = row_of[record["sample_data_token"]]
            labels[row].append(classes.index(name))
            codes[row].append(_code(tables, record))
    return labels, codes


def _wanted(tables: Path, row_of: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the annotations that have a mask; nuImages leaves a few out."""
    return (each for each in records(tables, "object_ann") if each["sample_data_token"] in row_of and each["mask"])


def _code(tables: Path, record: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(record["mask"]["counts"], validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise DataError(
            f"{tables / 'object_ann.json'}: the mask of '{record['token']}' is no base64 text ({error}). "
            "Extract the metadata archive of this version again."
        ) from error
