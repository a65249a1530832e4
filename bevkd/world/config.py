"""The configuration of the embedded driving world and its presets."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bevkd.config import StrictModel
from bevkd.errors import WorldError

ClassName = Literal[
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
]

GENERATOR_VERSION = 1
"""Raised whenever the same config yields other bytes, so that an old folder is not taken for a new world."""

VERSION_FOLDER = "v1.0-world"
"""Name of the folder with the tables, the ``version`` to give to nuscenes-devkit."""

TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT = "world_train", "world_val", "world_test"


_COMMON_CLASSES: dict[ClassName, float] = {
    "car": 7.8,
    "truck": 2.0,
    "pedestrian": 7.0,
    "bicycle": 3.2,
    "traffic_cone": 3.6,
}


class WorldConfig(StrictModel):
    """Everything that decides the bytes of a world."""

    seed: int = Field(0, ge=0, description="Scene i is drawn from (seed, i) alone.")
    scenes_train: int = Field(150, ge=1, description="Scenes of the split world_train.")
    scenes_val: int = Field(50, ge=1, description="Scenes of the split world_val, disjoint from world_train.")
    scenes_test: int = Field(0, ge=0, description="Scenes of the split world_test, disjoint from both.")
    keyframes_per_scene: int = Field(4, ge=1, description="Annotated frames of each scene.")
    keyframe_interval_s: float = Field(0.5, gt=0, le=5, description="Seconds between two key frames.")
    sweeps_per_keyframe: int = Field(1, ge=0, le=20, description="LiDAR and radar sweeps before each key frame.")
    camera_sweeps: bool = Field(False, description="Also render the cameras at the time of each sweep.")
    image_height: int = Field(128, ge=32, le=1600, description="Rows of every camera image.")
    image_width: int = Field(352, ge=64, le=3200, description="Columns of every camera image.")
    jpeg_quality: int = Field(90, ge=30, le=98, description="Quality of the JPEG files.")
    lidar_beams: int = Field(32, ge=4, le=128, description="Rings of the LiDAR, from -30.67 to +10.67 degrees.")
    lidar_azimuths: int = Field(480, ge=36, le=4096, description="Firings of each ring per turn.")
    lidar_noise_m: float = Field(0.02, ge=0, le=0.5, description="Standard deviation of the LiDAR range.")
    lidar_dropout: float = Field(0.08, ge=0, lt=1, description="Share of LiDAR returns that are lost.")
    classes: dict[ClassName, float] = Field(
        default_factory=lambda: dict(_COMMON_CLASSES),
        description="Mean number of objects of each class per scene; more on a long drive, at the same density.",
    )
    clutter: float = Field(1.0, ge=0, le=4, description="Density of unlabelled poles, bins, bushes, kiosks and trees.")
    terrain: Literal["flat", "hills"] = Field("flat", description="hills: uneven ground and camera pitch jitter.")
    spawn_range_m: float = Field(40.0, ge=15, le=80, description="Objects start within this distance along the road.")

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if not self.classes or any(not 0 <= count <= 60 for count in self.classes.values()):
            raise ValueError("classes: name at least one class, with a mean count per scene between 0 and 60")
        return self

    @property
    def scenes(self) -> int:
        """Number of scenes of all splits."""
        return self.scenes_train + self.scenes_val + self.scenes_test

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last key frame of a scene."""
        return (self.keyframes_per_scene - 1) * self.keyframe_interval_s

    def record(self) -> dict[str, Any]:
        """Return what ``world.json`` holds: the generator's version and this config."""
        return {"generator": GENERATOR_VERSION, "config": self.model_dump(mode="json")}

    def digest(self) -> str:
        """Return the hash of :meth:`record`, the same for equal worlds."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


_ALL_CLASSES: dict[ClassName, float] = {
    "car": 9.0,
    "truck": 2.0,
    "bus": 1.0,
    "trailer": 0.8,
    "construction_vehicle": 0.7,
    "pedestrian": 7.0,
    "motorcycle": 1.8,
    "bicycle": 2.4,
    "traffic_cone": 3.4,
    "barrier": 3.0,
}

# Denser than the default: most objects stay within the 25 m that the small detectors look at.
_NEAR: dict[str, Any] = {
    "spawn_range_m": 30.0,
    "classes": {"car": 8.0, "truck": 2.4, "pedestrian": 7.0, "bicycle": 4.4, "traffic_cone": 3.6},
}

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "scenes_train": 2,
        "scenes_val": 1,
        "keyframes_per_scene": 2,
        "image_height": 64,
        "image_width": 176,
        "lidar_azimuths": 240,
    },
    "demo": _NEAR,
    # What the tables of the documentation are measured on: weights are chosen on world_val, figures are of world_test.
    "bench": {**_NEAR, "scenes_train": 240, "scenes_val": 40, "scenes_test": 100},
    "full": {
        "scenes_train": 400,
        "scenes_val": 100,
        "image_height": 256,
        "image_width": 704,
        "lidar_azimuths": 1080,
        "sweeps_per_keyframe": 2,
        "classes": _ALL_CLASSES,
    },
    "hills": {"terrain": "hills"},
}


def world_preset(name: str, **overrides: Any) -> WorldConfig:
    """Return the preset ``tiny``, ``demo``, ``bench``, ``full`` or ``hills``.

    Args:
        name: the preset.
        overrides: fields of :class:`WorldConfig`, and ``scenes``: that many scenes in all, a quarter of them for val.

    Raises:
        WorldError: the preset or an override is unknown or out of range.
    """
    if name not in _PRESETS:
        raise WorldError(f"no world preset {name!r}. Choose one of: {', '.join(_PRESETS)}.")
    fields = {**_PRESETS[name], **overrides}
    scenes = fields.pop("scenes", None)
    if scenes is not None:
        if not isinstance(scenes, int) or scenes < 2:
            raise WorldError(f"scenes={scenes!r}: a world needs at least 2 scenes, one per split.")
        fields["scenes_val"] = max(1, round(scenes / 4))
        fields["scenes_train"] = scenes - fields["scenes_val"]
    try:
        return WorldConfig.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'world'}: {e['msg']}" for e in error.errors()]
        raise WorldError("\n".join([f"world preset {name!r} with these overrides is wrong:", *faults])) from error
