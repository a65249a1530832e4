"""What a data set must offer to bevkd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView
from bevkd.types import Boxes, Frame

Sensor = Literal["lidar", "camera", "previous_camera", "radar", "lidar_depth"]
"""What can be loaded of a frame. ``previous_camera`` adds the images of the key frame before, with the rig of that time
in the BEV frame of now; at the start of a scene the frame itself stands in for it. ``lidar_depth`` is the depth of the
frame's own LiDAR returns in the cameras."""


class FrameSource(Protocol):
    """A data set: an ordered list of frames, loaded by token.

    Instances are pickled into loader workers, so they hold paths and small arrays, never a data set's tables.

    Attributes:
        annotated: frames whose annotations are known, whether or not they are ``labelled``: only they can be scored.
        labelled: those of them that come with boxes.
        metrics: module of ``bevkd.evaluation`` that scores detections on these frames, or, with dots, a module from
            elsewhere (see ``bevkd.evaluation.score.Metrics``); None if there is none.
    """

    identity: DatasetIdentity
    metrics: str | None
    classes: tuple[str, ...]
    tokens: tuple[str, ...]
    annotated: frozenset[str]
    labelled: frozenset[str]

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the frame with the sensors asked for.

        ``views`` maps camera names to the view to decode, and leaves out cameras that are not wanted; None means all
        cameras at their original size. Boxes are None for frames outside ``labelled``. Raises DataError naming the
        file if it is missing or damaged.
        """
        ...

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return ``(H, W)`` of each camera's original image, in the rig's order, from the tables."""
        ...

    def annotations(self, token: str) -> Boxes:
        """Return the boxes of an ``annotated`` frame, ``labelled`` or not: for evaluation and pictures only.

        Other frames have none, which does not mean that there is nothing in them.
        """
        ...

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the pose of the BEV frame in the map frame (float64)."""
        ...

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return a fault, naming the file, for each sensor file of ``tokens`` that is missing or damaged."""
        ...
