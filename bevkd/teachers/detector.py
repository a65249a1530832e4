"""A bevkd detector as teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import model_validator

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig, parse, read_yaml
from bevkd.data.collate import Batch
from bevkd.errors import CheckpointError, ContractError
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.models.weights import load_weights
from bevkd.teachers.base import Teacher
from bevkd.types import Signals


class Config(PluginConfig):
    """A trained run, or an architecture with weights.

    Attributes:
        run: folder of a ``train-teacher`` run, which says what its detector is.
        detector: the architecture instead.
        weights: its safetensors file; None draws random weights, e.g. to time a cache or to test a pipeline.
        seed: of random weights.
        precision: of its dense layers; ``bfloat16`` and ``float16`` make most GPUs twice as fast. Sparse convolutions
            and the decoding of boxes stay in float32.
    """

    name: Literal["detector"] = "detector"
    run: Path | None = None
    detector: DetectorConfig | None = None
    weights: Path | None = None
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.run is None) == (self.detector is None):
            raise ValueError("give either 'run' (a folder of train-teacher) or 'detector' (an architecture), not both")
        if self.run is not None and self.weights is not None:
            raise ValueError("'weights' belong to 'detector'; a 'run' brings its own")
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
        tasks = len(detector.head.tasks)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            "bev_low": (detector.encoder.out_channels, *rows_columns),
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
            bev_low=output.bev_low,
            bev_high=output.bev_high,
            heatmap=output.head.heatmap,
            box_code=output.head.box_code,
            boxes=tuple(self._detector.head.decode(output.head)),
        )


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    """Return the teacher for a data set's classes.

    Raises:
        ContractError: the run was trained on other classes.
        CheckpointError: the run's weights are missing or do not fit.
    """
    detector_config = _trained(config.run, classes) if config.run else config.detector
    assert detector_config is not None  # the config's validator sees to it
    torch.manual_seed(config.seed)
    detector = Detector(detector_config, classes)
    weights = config.run / "model.safetensors" if config.run else config.weights
    if weights:
        load_weights(weights, detector)
    identity = TeacherIdentity(
        name=config.name,
        architecture=detector_config.model_dump(mode="json"),
        weights_sha256=_weights_digest(detector),
        preprocessing={
            "sensors": [str(sensor) for sensor in sorted(detector_config.sensors)],
            "augmentation": None,
            "precision": config.precision,
        },
        origin=weights.name if weights else f"random weights of seed {config.seed}",
    )
    return DetectorTeacher(detector, identity, device, getattr(torch, config.precision))


def _trained(run: Path, classes: Sequence[str]) -> DetectorConfig:
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(
            f"teacher.run: there is no run in {run} (no recipe.yaml). Give the --out folder of a train-teacher run."
        )
    recipe = read_yaml(run / "recipe.yaml")
    trained_on = recipe.get("data", {}).get("classes", [])
    if list(trained_on) != list(classes):
        raise ContractError(
            f"the teacher in {run} was trained on the classes {', '.join(trained_on)}, this recipe has "
            f"{', '.join(classes)}. Set data.classes to the teacher's list, in its order."
        )
    return parse(DetectorConfig, recipe["detector"], str(run / "recipe.yaml"))


def _weights_digest(detector: Detector) -> str:
    """Return the SHA-256 over names, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
