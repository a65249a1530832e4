"""Camera images with the masks of their objects: what a segmenter learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pycocotools import mask as coco_mask
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.utils.data import Dataset

from bevkd.config import StrictModel
from bevkd.data.augment import ImageAugment, draw_view, scale_brightness
from bevkd.data.images import ImageView, read_image
from bevkd.data.sampler import FrameOrder, mix
from bevkd.data.sources._nuscenes_files import file_faults
from bevkd.data.sources._nuscenes_instances import ImageTable, read_image_table
from bevkd.data.sources._nuscenes_select import check_folders
from bevkd.data.sources.nuscenes import CLASSES, check_classes
from bevkd.geometry.masks import gather_cameras, move_instances, tighten
from bevkd.types import Instances


class InstanceDataConfig(StrictModel):
    """Which annotated camera images to read from where: nuImages, or a world.

    Attributes:
        root: folder that holds ``samples/`` and the folder ``version``.
        version: of nuImages ``v1.0-train``, ``v1.0-val`` or ``v1.0-mini``.
        split: of a world, one of its ``splits.json``; None takes all key images of the version.
        classes: detection classes wanted; objects of others are left out.
        min_area_px: objects with fewer visible pixels in the original image are neither learned nor scored.
    """

    root: Path
    version: str = "v1.0-train"
    split: str | None = None
    classes: Annotated[tuple[str, ...], AfterValidator(check_classes)] = CLASSES
    min_area_px: int = Field(default=1, ge=1)


class ImageSource:
    """The key camera images that a config asks for, each by the token of its ``sample_data`` record.

    Attributes:
        classes: names of the labels.
        tokens: of the images, by time.
    """

    def __init__(self, config: InstanceDataConfig, table: ImageTable) -> None:
        self.config, self.classes, self.tokens = config, config.classes, table.tokens
        self._table = table
        self._rows = {token: row for row, token in enumerate(table.tokens)}

    def size(self, token: str) -> tuple[int, int]:
        """Return ``(H, W)`` of the original image, from the table."""
        height, width = self._table.sizes[self._rows[token]].tolist()
        return height, width

    def image(self, token: str, view: ImageView | None = None) -> UInt8[Tensor, "3 H W"]:
        """Return ``view`` of the image, or all of it; raises DataError naming the file if it cannot be read."""
        path = self.config.root / self._table.files[self._rows[token]]
        return read_image(path, view, self.size(token))

    def instances(self, token: str) -> Instances:
        """Return all annotated objects of the image, however small; their camera is 0."""
        row = self._rows[token]
        span = slice(*self._table.offsets[row : row + 2].tolist())
        size = self.size(token)
        boxes, labels, masks = [], [], []
        for label, code in zip(self._table.labels[span].tolist(), self._table.codes[span], strict=True):
            decoded = coco_mask.decode({"size": list(size), "counts": code}).astype(bool)
            tight = tighten(torch.from_numpy(np.ascontiguousarray(decoded)))
            if tight is not None:
                masks.append(tight[0])
                boxes.append(tight[1])
                labels.append(label)
        n = len(masks)
        return Instances(
            torch.zeros(n, dtype=torch.int64),
            torch.tensor(boxes, dtype=torch.float32).view(n, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.ones(n),
            tuple(masks),
        )

    def check(self) -> list[str]:
        """Return a fault, naming the file, for each image that is missing or damaged."""
        found = file_faults(self.config.root, list(self._table.files))
        return [f"{self.config.root / file}: {fault}" for file, fault in found.items()]


def open_images(config: InstanceDataConfig) -> ImageSource:
    """Return the images of ``config``.

    Raises:
        DataError: folder, version, table or split is missing or damaged, or there is no image.
    """
    tables = check_folders(config.root, config.version)
    return ImageSource(config, read_image_table(tables, config.split, config.classes))


@dataclass(frozen=True)
class ImageSample:
    """One view of an image.

    Attributes:
        instances: in view pixels, of camera 0.
        view_from_original: pixel transform.
    """

    token: str
    image: UInt8[Tensor, "3 H W"]
    instances: Instances
    view_from_original: Float[Tensor, "3 3"]


@dataclass(frozen=True)
class ImageBatch:
    """M images side by side.

    Attributes:
        instances: of all images, in view pixels; their camera is the number of the image in the batch.
        view_from_original: pixel transform of each image.
    """

    tokens: tuple[str, ...]
    images: UInt8[Tensor, "M 3 H W"]
    instances: Instances
    view_from_original: Float[Tensor, "M 3 3"]

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> ImageBatch:
        """Return the batch on ``device`` (asynchronously from pinned memory)."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            instances=self.instances.to(device),
            view_from_original=self.view_from_original.to(device),
        )

    def pin_memory(self) -> ImageBatch:
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return replace(self, images=self.images.pin_memory())


def collate_images(samples: Sequence[ImageSample]) -> ImageBatch:
    """Return ``samples`` as one batch; all views must have the same size."""
    return ImageBatch(
        tokens=tuple(sample.token for sample in samples),
        images=torch.stack([sample.image for sample in samples]),
        instances=gather_cameras([sample.instances for sample in samples], 1),
        view_from_original=torch.stack([sample.view_from_original for sample in samples]),
    )


class ImageDataset(Dataset[ImageSample]):
    """Images by index, as they are: for evaluation, which compares in original pixels, so without instances."""

    def __init__(self, source: ImageSource, tokens: Sequence[str], height: int, width: int) -> None:
        self.source, self.tokens, self.size = source, tuple(tokens), (height, width)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> ImageSample:
        token = self.tokens[index]
        view = ImageView.cover(self.source.size(token), *self.size)
        return ImageSample(token, self.source.image(token, view), Instances.empty(), view.matrix())


class InstanceDataset(Dataset[ImageSample]):
    """Augmented images with their instances, by position in the run: a pure function of (seed, position).

    Args:
        height, width: of the views, pixels.
    """

    def __init__(self, source: ImageSource, height: int, width: int, augment: ImageAugment, seed: int) -> None:
        self.source, self.size, self.augment, self.seed = source, (height, width), augment, seed
        self.order = FrameOrder(source.tokens, (), None, seed)

    def __getitem__(self, position: int) -> ImageSample:
        token = self.order[position]
        generator = torch.Generator().manual_seed(mix(self.seed, position))
        view = draw_view(self.source.size(token), *self.size, self.augment, generator)
        image = scale_brightness(self.source.image(token, view)[None], self.augment, generator)[0]
        everything = self.source.instances(token)
        area = torch.tensor([int(mask.sum()) for mask in everything.masks], dtype=torch.int64)
        learned = everything[area >= self.source.config.min_area_px]
        instances = move_instances(learned, view.matrix()[None], self.size)
        return ImageSample(token, image, instances, view.matrix())
