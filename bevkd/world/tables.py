"""The constant tables of nuScenes and the tokens of all records."""

from __future__ import annotations

import hashlib
from typing import Any

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import quaternion
from bevkd.world.objects import CLASSES
from bevkd.world.rig import RIG, intrinsics

Row = dict[str, Any]
Tables = dict[str, list[Row]]

CATEGORIES = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
VISIBILITIES = (("1", "v0-40", 0.0), ("2", "v40-60", 0.4), ("3", "v60-80", 0.6), ("4", "v80-100", 0.8))

TABLE_NAMES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
MASK_TABLE = "object_ann"
"""Name of the extra table with instance masks, in the layout of nuImages."""


class Tokens:
    """Makes the 32-digit tokens of a world: hashes of the config and of what is named."""

    def __init__(self, config: WorldConfig) -> None:
        self._prefix = config.digest()

    def __call__(self, *names: object) -> str:
        text = "/".join([self._prefix, *map(str, names)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def visibility_token(share: float) -> str:
    """Return the token of the highest visibility level that ``share`` (0 to 1) reaches."""
    return max(token for token, _, least in VISIBILITIES if share >= least)


def constant_tables(config: WorldConfig) -> Tables:
    """Return the tables that do not depend on any scene."""
    token = Tokens(config)
    used = {c.category: name for name, c in CLASSES.items()}
    sensors = [{"token": token("sensor", m.channel), "channel": m.channel, "modality": m.modality} for m in RIG]
    return {
        "category": [
            {"token": token("category", c), "name": c, "description": f"the world's {used[c]}" if c in used else ""}
            for c in CATEGORIES
        ],
        "attribute": [{"token": token("attribute", a), "name": a, "description": ""} for a in ATTRIBUTES],
        "visibility": [
            {"token": t, "level": level, "description": "share of the pixels over all six cameras that nothing hides"}
            for t, level, _ in VISIBILITIES
        ],
        "sensor": sensors,
        "calibrated_sensor": [
            {
                "token": token("calibrated_sensor", m.channel),
                "sensor_token": token("sensor", m.channel),
                "translation": [float(v) for v in m.translation],
                "rotation": quaternion(m.ego_from_sensor.rotation),
                "camera_intrinsic": intrinsics(config, m).tolist() if m.modality == "camera" else [],
            }
            for m in RIG
        ],
    }
