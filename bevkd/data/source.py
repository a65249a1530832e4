"""What a data set must offer to bevkd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView
from bevkd.types import Boxes, Frame

Sensor = Literal["lidar", "camera", "radar"]


class FrameSource(Protocol):
    """A data set: an ordered list of key frames, loaded by token.

    Instances are pickled into loader workers, so they hold paths and small arrays, never a data set's tables.
    """

    identity: DatasetIdentity
    classes: tuple[str, ...]
    tokens: tuple[str, ...]
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
        """Return the frame's boxes whether or not it is ``labelled``: for evaluation and pictures only."""
        ...

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the pose of the BEV frame in the map frame (float64)."""
        ...

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return a fault, naming the file, for each sensor file of ``tokens`` that is missing or damaged."""
        ...
