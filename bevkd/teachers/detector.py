"""A bevkd detector as teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig, parse
from bevkd.data.collate import Batch
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.models.weights import load_weights
from bevkd.teachers._runs import trained_part, weights_digest
from bevkd.teachers.base import Teacher
from bevkd.teachers.checkpoints import Kernels, Version, load_checkpoint
from bevkd.types import Signals


class Config(PluginConfig):
    """A trained run, or an architecture with weights.

    Attributes:
        run: folder of a ``train-teacher`` run, which says what its detector is.
        detector: the architecture instead.
        weights: its safetensors file; without one, or a ``checkpoint``, its weights are random, e.g. to time a cache or
            to test a pipeline.
        checkpoint: file of another framework instead: OpenPCDet, mmdetection3d, CenterPoint (det3d), BEVFusion (MIT).
        checkpoint_version: of mmdetection3d, if the file does not say: 1.0 changed what sizes and yaw mean.
        checkpoint_kernels: order of the file's sparse kernels, if their shapes do not tell.
        seed: of random weights.
        precision: of its dense layers; ``bfloat16`` and ``float16`` make most GPUs twice as fast. Sparse convolutions
            and the decoding of boxes stay in float32.
    """

    name: Literal["detector"] = "detector"
    run: Path | None = None
    detector: DetectorConfig | None = None
    weights: Path | None = None
    checkpoint: Path | None = None
    checkpoint_version: Version | None = None
    checkpoint_kernels: Kernels | None = None
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.run is None) == (self.detector is None):
            raise ValueError("give either 'run' (a folder of train-teacher) or 'detector' (an architecture), not both")
        if self.run is not None and (self.weights is not None or self.checkpoint is not None):
            raise ValueError("'weights' and 'checkpoint' belong to 'detector'; a 'run' brings its own")
        if self.weights is not None and self.checkpoint is not None:
            raise ValueError("give either 'weights' (safetensors of bevkd) or 'checkpoint' (another framework's file)")
        return self


class DetectorTeacher:
    """Runs a detector in eval mode and hands out every map."""

    def __init__(
        self,
        detector: Detector,
        identity: TeacherIdentity,
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.identity, self.classes = identity, detector.classes
        self.grid, self.view = detector.config.grid, view_of(detector.config)
        self._detector = detector.to(device).eval()
        self._device, self._precision = device, precision
        rows_columns = self.grid.shape
        tasks = len(detector.head.labels_of_task)
        fineness = getattr(detector.encoder, "fineness", 1)
        low = {"bev_low": (detector.encoder.out_channels, *rows_columns)} if fineness == 1 else {}
        self.absent: Mapping[str, str] = (
            {}
            if low
            else {
                "bev_low": f"each cell of the grid has {fineness} x {fineness} of the encoder's pillars, and maps in "
                "caches lie on the grid"
            }
        )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **low,
            "bev_high": (detector.bev_encoder.out_channels, *rows_columns),
            "heatmap": (len(self.classes), *rows_columns),
            "box_code": (tasks, 10, *rows_columns),
        }

    @torch.inference_mode()
    def infer(self, batch: Batch) -> Signals:
        """Return all signals of a batch, on the teacher's device."""
        half = self._precision != torch.float32
        with torch.autocast(self._device.type, self._precision if half else None, enabled=half):
            output = self._detector(batch.to(self._device))
        return Signals(
            bev_low=output.bev_low if "bev_low" in self.shapes else None,
            bev_high=output.bev_high,
            heatmap=output.head.heatmap,
            box_code=output.head.box_code,
            boxes=tuple(self._detector.head.decode(output.head)),
        )


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    """Return the teacher for a data set's classes.

    Raises:
        ContractError: the run was trained on other classes.
        CheckpointError: the weights are missing or do not fit.
    """
    detector_config = config.detector
    if config.run:
        trained = trained_part(config.run, "detector", classes)
        detector_config = parse(DetectorConfig, trained, str(config.run / "recipe.yaml"))
    assert detector_config is not None  # the config's validator sees to it
    torch.manual_seed(config.seed)
    detector = Detector(detector_config, classes)
    origin = _load(config, detector)
    identity = TeacherIdentity(
        name=config.name,
        architecture=detector_config.model_dump(mode="json"),
        weights_sha256=weights_digest(detector),
        preprocessing={
            "sensors": [str(sensor) for sensor in sorted(detector_config.sensors)],
            "augmentation": None,
            "precision": config.precision,
        },
        origin=origin,
    )
    return DetectorTeacher(detector, identity, device, getattr(torch, config.precision))


def _load(config: Config, detector: Detector) -> str:
    """Load the weights that the config names and return where they are from."""
    if config.checkpoint:
        layout = load_checkpoint(config.checkpoint, detector, config.checkpoint_version, config.checkpoint_kernels)
        return f"{config.checkpoint.name}, converted from {layout}"
    weights = config.run / "model.safetensors" if config.run else config.weights
    if weights is None:
        return f"random weights of seed {config.seed}"
    load_weights(weights, detector)
    return weights.name
