"""Frames joined with what the caches hold of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from bevkd.cache.reader import CacheReader
from bevkd.cache.variants import split_token, variant_token
from bevkd.data.augment import AugmentConfig, apply_affine, draw_view, scale_brightness
from bevkd.data.collate import Sample
from bevkd.data.images import ImageView
from bevkd.data.sampler import FrameOrder, mix
from bevkd.data.source import FrameSource, Sensor
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.camera import move_depth
from bevkd.geometry.masks import in_views
from bevkd.geometry.symmetries import SYMMETRIES, nearest_symmetry

INSTANCES = "instances"
"""The signal that is brought into the views as it is read."""


@dataclass(frozen=True)
class View:
    """What an encoder wants of a frame: sensors, and the size of the images in pixels."""

    sensors: frozenset[Sensor]
    image_height: int = 0
    image_width: int = 0


class FrameDataset(Dataset[Sample]):
    """Frames by index, as they are: for caching and evaluation."""

    def __init__(self, source: FrameSource, tokens: Sequence[str], view: View) -> None:
        self.source, self.tokens, self.view = source, tuple(tokens), view

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        token = self.tokens[index]
        frame = self.source.load(token, self.view.sensors, self._views(token))
        return Sample(frame, BEVAffine.identity(), {})

    def _views(self, token: str) -> Mapping[str, ImageView] | None:
        if "camera" not in self.view.sensors:
            return None
        height, width = self.view.image_height, self.view.image_width
        return {name: ImageView.cover(size, height, width) for name, size in self.source.image_sizes(token).items()}


class VariantDataset(FrameDataset):
    """Frames by index, flipped and turned as their tokens say: for caching with variants."""

    def __getitem__(self, index: int) -> Sample:
        token, variant = split_token(self.tokens[index])
        frame, affine = self.source.load(token, self.view.sensors, self._views(token)), SYMMETRIES[variant]
        if variant:  # a frame as it is keeps its bytes
            frame = replace(apply_affine(frame, affine), token=self.tokens[index])
        return Sample(frame, affine, {})


class TrainingDataset(Dataset[Sample]):
    """Augmented frames with cached signals, by position in the run: a pure function of (seed, position).

    Of a cache with variants the one that comes nearest to the drawn augmentation is read.

    Args:
        order: which frame stands where.
        caches: reader and the signals to read, by cache name.
        depth: the cache that holds ``lidar_depth``, which is then not loaded from point clouds.
    """

    def __init__(
        self,
        source: FrameSource,
        view: View,
        order: FrameOrder,
        augment: AugmentConfig,
        caches: Mapping[str, tuple[CacheReader, tuple[str, ...]]],
        seed: int,
        depth: CacheReader | None = None,
    ) -> None:
        self.source, self.view, self.order, self.augment = source, view, order, augment
        self.caches, self.seed, self.depth = caches, seed, depth

    @property
    def remote(self) -> bool:
        """Whether samples come over a network."""
        readers = [*(reader for reader, _ in self.caches.values()), *([self.depth] if self.depth else [])]
        return any(reader.store.remote for reader in readers)

    def __getitem__(self, position: int) -> Sample:
        token = self.order[position]
        generator = torch.Generator().manual_seed(mix(self.seed, position))
        affine = BEVAffine.sample(self.augment.bev, generator)
        views, height, width = None, self.view.image_height, self.view.image_width
        if "camera" in self.view.sensors:
            views = {
                name: draw_view(size, height, width, self.augment.image, generator)
                for name, size in self.source.image_sizes(token).items()
            }
        frame = self.source.load(token, self.view.sensors, views)
        if frame.images is not None:
            frame = replace(frame, images=scale_brightness(frame.images, self.augment.image, generator))
        if self.depth is not None:
            frame = replace(frame, lidar_depth=self.depth.lidar_depth(token))
        if frame.lidar_depth is not None and frame.rig is not None:
            originals = frame.rig.view_from_original
            frame = replace(frame, lidar_depth=move_depth(frame.lidar_depth, originals, height, width))
        stored, left, instances = {}, {}, {}
        for name, (reader, signals) in self.caches.items():
            variant, left[name] = nearest_symmetry(affine, reader.variants)
            # Masks differ in size and number: they are unpacked here, where loader processes share the work.
            stored[name] = reader.tensors(
                variant_token(token, variant), [each for each in signals if each != INSTANCES]
            )
            if INSTANCES in signals and frame.rig is not None:
                seen = reader.instances(token)
                instances[name] = in_views(seen, frame.rig.view_from_original, (height, width))
        return Sample(apply_affine(frame, affine), affine, stored, left, instances)
