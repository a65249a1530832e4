"""What teachers of instance masks share: from images in views to instances in original pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bevkd.cache.manifest import TeacherIdentity
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.geometry.masks import move_instances, split_cameras
from bevkd.grid import BEVGrid
from bevkd.types import Instances, Signals


class MaskTeacher:
    """Runs a segmentation network over all cameras of a batch; writes ``instances`` and nothing else.

    Args:
        infer: instances in 8-bit RGB images ``[M, 3, H, W]`` on ``device``, in their pixels; an instance's camera is
            the number of its image.
        size: height and width of the images that the network sees, pixels.
    """

    shapes: Mapping[str, tuple[int, ...]] = {"instances": ()}
    absent: Mapping[str, str] = {"boxes": "it sees images, not space"}

    def __init__(
        self,
        infer: Callable[[Tensor], Instances],
        identity: TeacherIdentity,
        size: tuple[int, int],
        grid: BEVGrid,
        classes: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.identity, self.grid, self.classes = identity, grid, classes
        self.view = View(frozenset({"camera"}), *size)
        self._infer, self._device = infer, device

    @torch.inference_mode()
    def infer(self, batch: Batch) -> Signals:
        """Return the instances of a batch, in pixels of the original images."""
        if batch.images is None or batch.view_from_original is None:
            raise ValueError("a teacher of masks needs images in the batch")
        frames, cameras = batch.images.shape[:2]
        found = self._infer(batch.images.flatten(0, 1).to(self._device))
        original_from_view = torch.linalg.inv(batch.view_from_original.flatten(0, 1).double())
        return Signals(instances=split_cameras(move_instances(found, original_from_view), cameras, frames))
