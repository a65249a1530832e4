"""bevkd's own segmenter as teacher of instance masks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig, parse
from bevkd.grid import BEVGrid
from bevkd.models.segmenter import Segmenter, SegmenterConfig
from bevkd.models.weights import load_weights
from bevkd.teachers._masks import MaskTeacher
from bevkd.teachers._runs import trained_part, weights_digest
from bevkd.teachers.base import Teacher
from bevkd.types import Instances


class Config(PluginConfig):
    """A trained run.

    Attributes:
        run: folder of a ``train-teacher`` run of a segmenter.
        grid: of the students that read the cache, which is compared with it; masks do not depend on it.
    """

    name: Literal["segmenter"] = "segmenter"
    run: Path
    grid: BEVGrid


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    """Return the teacher for a data set's classes.

    Raises:
        ContractError: the run trained no segmenter, or one of other classes.
        CheckpointError: the run's weights are missing or do not fit.
    """
    trained = trained_part(config.run, "segmenter", classes)
    architecture = parse(SegmenterConfig, trained, str(config.run / "recipe.yaml"))
    segmenter = Segmenter(architecture, classes)
    load_weights(config.run / "model.safetensors", segmenter)
    identity = TeacherIdentity(
        name=config.name,
        architecture=architecture.model_dump(mode="json", exclude={"backbone": {"weights"}}),
        weights_sha256=weights_digest(segmenter),
        preprocessing={"sensors": ["camera"], "augmentation": None},
        origin="model.safetensors",
    )
    segmenter.to(device).eval()

    def infer(images: UInt8[Tensor, "M 3 H W"]) -> Instances:
        return segmenter.head.decode(segmenter(images))

    size = (architecture.image_height, architecture.image_width)
    return MaskTeacher(infer, identity, size, config.grid, classes, device)
