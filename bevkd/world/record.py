"""Records one scene: renders all sensors, writes their files and returns the rows of the tables."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import Bools, Bytes, Floats32, Ints, Pose, quaternion, rotation_zyx
from bevkd.world.lidar import points_in_boxes, scan
from bevkd.world.parts import Parts, join
from bevkd.world.radar import RadarMotion, detect, pcd_bytes
from bevkd.world.render import Shot, static_shadows, take
from bevkd.world.rig import LIDAR, RADARS, RIG, Mount, intrinsics
from bevkd.world.scene import Scene, draw_scene
from bevkd.world.street import CELL_M, DRIVABLE
from bevkd.world.tables import MASK_TABLE, Row, Tables, Tokens, visibility_token

_EPOCH_US = 1_600_000_000_000_000
_SCENE_GAP_US = 120_000_000
_SUFFIX = {"lidar": ".pcd.bin", "camera": ".jpg", "radar": ".pcd"}
_FORMAT = {"lidar": "pcd", "camera": "jpg", "radar": "pcd"}


@dataclass(frozen=True)
class _Tick:
    """A moment at which sensors fire: ``frame`` is the key frame it belongs to, ``step`` counts back from it."""

    frame: int
    step: int
    t: float

    @property
    def is_key(self) -> bool:
        return self.step == 0


@dataclass
class _Evidence:
    """What the sensors saw of each object at one key frame."""

    lidar: Ints
    radar: Ints
    shown: Ints
    covered: Ints


@dataclass
class _Recorder:
    config: WorldConfig
    index: int
    out: Path
    scene: Scene
    shadow: Bytes
    token: Tokens
    tables: Tables = field(default_factory=dict)

    def add(self, table: str, row: Row) -> None:
        self.tables.setdefault(table, []).append(row)

    @property
    def name(self) -> str:
        return f"scene-{self.index:04d}"

    def time_us(self, t: float) -> int:
        return _EPOCH_US + self.index * _SCENE_GAP_US + round(t * 1e6)

    def rng(self, *names: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.index, 1, *names])


def record_scene(config: WorldConfig, index: int, out: Path) -> Tables:
    """Write the sensor files of scene ``index`` under ``out`` and return its rows, table by table."""
    scene = draw_scene(config, index)
    recorder = _Recorder(config, index, out, scene, static_shadows(scene), Tokens(config))
    ticks = _ticks(config)
    for tick in ticks:
        evidence = _fire(recorder, tick)
        if tick.is_key:
            _annotate(recorder, tick, evidence)
    _link_sample_data(recorder, ticks)
    _finish(recorder)
    return recorder.tables


def _ticks(config: WorldConfig) -> list[_Tick]:
    """Return all moments in order; the sweeps of a key frame come right before it."""
    gap = config.keyframe_interval_s / (config.sweeps_per_keyframe + 1)
    return [
        _Tick(frame, step, frame * config.keyframe_interval_s - step * gap)
        for frame in range(config.keyframes_per_scene)
        for step in range(config.sweeps_per_keyframe, -1, -1)
    ]


def _mounts(config: WorldConfig, tick: _Tick) -> tuple[Mount, ...]:
    if tick.is_key or config.camera_sweeps:
        return RIG
    return (LIDAR, *RADARS)


def _fire(recorder: _Recorder, tick: _Tick) -> _Evidence:
    """Write the files and ``sample_data`` rows of all sensors at one moment."""
    count = len(recorder.scene.actors)
    evidence = _Evidence(*(np.zeros(count, dtype=np.int64) for _ in range(4)))
    for mount in _mounts(recorder.config, tick):
        t = tick.t + mount.offset_s
        scene_from_ego = recorder.scene.ego_pose_at(t)
        scene_from_sensor = scene_from_ego @ mount.ego_from_sensor
        rng = recorder.rng(tick.frame, tick.step, RIG.index(mount))
        if mount.modality == "camera":
            shot = _photograph(recorder, mount, t, scene_from_sensor, rng)
            payload = _jpeg(shot, recorder.config.jpeg_quality)
            if tick.is_key:
                evidence.shown += _owner_pixels(shot, count)
                evidence.covered += shot.covered
                _mask_rows(recorder, tick, mount, shot)
        else:
            payload, points = _range(recorder, mount, t, scene_from_sensor, rng)
            if tick.is_key:
                inside = _count_in_boxes(recorder.scene, t, scene_from_sensor, points)
                counter = evidence.lidar if mount.modality == "lidar" else evidence.radar
                counter += inside
        _sample_data(recorder, tick, mount, t, scene_from_ego, payload)
    return evidence


def _parts(scene: Scene, t: float) -> Parts:
    return join(scene.static, scene.moving_parts_at(t))


def _photograph(recorder: _Recorder, mount: Mount, t: float, pose: Pose, rng: np.random.Generator) -> Shot:
    config = recorder.config
    size = config.image_height, config.image_width
    return take(recorder.scene, t, pose, intrinsics(config, mount), size, recorder.shadow, rng)


def _jpeg(shot: Shot, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(shot.image).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def _range(recorder: _Recorder, mount: Mount, t: float, pose: Pose, rng: np.random.Generator) -> tuple[bytes, Floats32]:
    """Return the file of a LiDAR or radar and its points ``n 3+``."""
    scene = recorder.scene
    parts = _parts(scene, t)
    if mount.modality == "lidar":
        points = scan(recorder.config, scene.street, parts, pose, rng)
        return points.tobytes(), points
    velocity, turn = scene.ego_velocity_at(t)
    arm = pose.translation - scene.ego_pose_at(t).translation
    motion = RadarMotion(velocity + turn * np.array([-arm[1], arm[0]]))
    found = detect(parts, scene.actors_at(t), pose, motion, rng)
    return pcd_bytes(found), np.stack([found["x"], found["y"], found["z"]], axis=1)


def _count_in_boxes(scene: Scene, t: float, scene_from_sensor: Pose, points: Floats32) -> Ints:
    """Return the number of points in each annotated box.

    Annotations belong to the time of the key frame. A radar fires a little earlier or later, but so little that the
    box of its own time is the fair one.
    """
    state = scene.actors_at(t)
    sensor_from_scene = scene_from_sensor.inverse()
    centres = sensor_from_scene.apply(state.centre)
    turns = np.array([sensor_from_scene.rotation @ rotation_zyx(float(yaw)) for yaw in state.yaw]).reshape(-1, 3, 3)
    sizes = np.array([actor.size for actor in scene.actors]).reshape(-1, 3)
    inside: list[Bools] = points_in_boxes(points[:, :3].astype(np.float64), centres, sizes, turns)
    return np.array([int(mask.sum()) for mask in inside], dtype=np.int64)


def _owner_pixels(shot: Shot, count: int) -> Ints:
    return np.bincount(shot.owner.ravel() + 1, minlength=count + 1)[1:]


def _mask_rows(recorder: _Recorder, tick: _Tick, mount: Mount, shot: Shot) -> None:
    """Add one row with box and mask for each labelled object that the camera sees."""
    for actor in np.unique(shot.owner[shot.owner >= 0]):
        mask = shot.owner == actor
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        category = recorder.scene.actors[actor].cls.category
        names = (recorder.name, tick.frame, mount.channel, int(actor))
        recorder.add(
            MASK_TABLE,
            {
                "token": recorder.token(MASK_TABLE, *names),
                "sample_data_token": _data_token(recorder, tick, mount),
                "category_token": recorder.token("category", category),
                "instance_token": recorder.token("instance", recorder.name, int(actor)),
                "attribute_tokens": _attribute_tokens(recorder, int(actor)),
                "bbox": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
                "mask": {"size": [int(v) for v in code["size"]], "counts": base64.b64encode(code["counts"]).decode()},
            },
        )


def _attribute_tokens(recorder: _Recorder, actor: int) -> list[str]:
    attribute = recorder.scene.actors[actor].attribute
    return [recorder.token("attribute", attribute)] if attribute else []


def _data_token(recorder: _Recorder, tick: _Tick, mount: Mount) -> str:
    return recorder.token("sample_data", recorder.name, tick.frame, tick.step, mount.channel)


def _sample_data(
    recorder: _Recorder, tick: _Tick, mount: Mount, t: float, scene_from_ego: Pose, payload: bytes
) -> None:
    """Write one sensor file with its ``sample_data`` and ``ego_pose`` rows."""
    stamp = recorder.time_us(t)
    folder = "samples" if tick.is_key else "sweeps"
    name = f"{folder}/{mount.channel}/world-{recorder.name}__{mount.channel}__{stamp}{_SUFFIX[mount.modality]}"
    (recorder.out / name).write_bytes(payload)
    pose = recorder.scene.global_from_scene @ scene_from_ego
    token = _data_token(recorder, tick, mount)
    is_camera = mount.modality == "camera"
    recorder.add(
        "ego_pose",
        {
            "token": token,
            "timestamp": stamp,
            "rotation": quaternion(pose.rotation),
            "translation": [float(v) for v in pose.translation],
        },
    )
    recorder.add(
        "sample_data",
        {
            "token": token,
            "sample_token": recorder.token("sample", recorder.name, tick.frame),
            "ego_pose_token": token,
            "calibrated_sensor_token": recorder.token("calibrated_sensor", mount.channel),
            "timestamp": stamp,
            "fileformat": _FORMAT[mount.modality],
            "is_key_frame": tick.is_key,
            "height": recorder.config.image_height if is_camera else 0,
            "width": recorder.config.image_width if is_camera else 0,
            "filename": name,
            "prev": "",
            "next": "",
        },
    )


def _annotate(recorder: _Recorder, tick: _Tick, evidence: _Evidence) -> None:
    """Add the sample and the annotations of all objects at a key frame."""
    scene, frames, name = recorder.scene, recorder.config.keyframes_per_scene, recorder.name

    def linked(table: str, frame: int, *names: object) -> str:
        return recorder.token(table, name, frame, *names) if 0 <= frame < frames else ""

    recorder.add(
        "sample",
        {
            "token": linked("sample", tick.frame),
            "timestamp": recorder.time_us(tick.t),
            "prev": linked("sample", tick.frame - 1),
            "next": linked("sample", tick.frame + 1),
            "scene_token": recorder.token("scene", name),
        },
    )
    state = scene.actors_at(tick.t)
    centres = scene.global_from_scene.apply(state.centre)
    for i, actor in enumerate(scene.actors):
        length, width, height = actor.size
        share = evidence.shown[i] / evidence.covered[i] if evidence.covered[i] else 0.0
        recorder.add(
            "sample_annotation",
            {
                "token": linked("sample_annotation", tick.frame, i),
                "sample_token": linked("sample", tick.frame),
                "instance_token": recorder.token("instance", name, i),
                "visibility_token": visibility_token(share),
                "attribute_tokens": _attribute_tokens(recorder, i),
                "translation": [float(v) for v in centres[i]],
                "size": [width, length, height],
                "rotation": quaternion(rotation_zyx(float(state.yaw[i]) + scene.heading)),
                "prev": linked("sample_annotation", tick.frame - 1, i),
                "next": linked("sample_annotation", tick.frame + 1, i),
                "num_lidar_pts": int(evidence.lidar[i]),
                "num_radar_pts": int(evidence.radar[i]),
            },
        )


def _link_sample_data(recorder: _Recorder, ticks: list[_Tick]) -> None:
    """Chain the files of each sensor in time."""
    rows = {row["token"]: row for row in recorder.tables["sample_data"]}
    for mount in RIG:
        chain = [_data_token(recorder, tick, mount) for tick in ticks if mount in _mounts(recorder.config, tick)]
        for before, after in pairwise(chain):
            rows[before]["next"], rows[after]["prev"] = after, before


def _finish(recorder: _Recorder) -> None:
    """Add the scene with its log, map and instances."""
    scene, name, token = recorder.scene, recorder.name, recorder.token
    frames = recorder.config.keyframes_per_scene
    for i, actor in enumerate(scene.actors):
        recorder.add(
            "instance",
            {
                "token": token("instance", name, i),
                "category_token": token("category", actor.cls.category),
                "nbr_annotations": frames,
                "first_annotation_token": token("sample_annotation", name, 0, i),
                "last_annotation_token": token("sample_annotation", name, frames - 1, i),
            },
        )
    recorder.add(
        "scene",
        {
            "token": token("scene", name),
            "log_token": token("log", name),
            "nbr_samples": frames,
            "first_sample_token": token("sample", name, 0),
            "last_sample_token": token("sample", name, frames - 1),
            "name": name,
            "description": f"{len(scene.actors)} objects, {scene.street.lanes} lanes each way",
        },
    )
    recorder.add(
        "log",
        {
            "token": token("log", name),
            "logfile": f"world-{name}",
            "vehicle": "world",
            "date_captured": "2020-09-13",
            "location": f"world-{name}",
        },
    )
    filename = f"maps/{token('map', name)}.png"
    Image.fromarray(_map_mask(scene)).save(recorder.out / filename, "PNG", compress_level=1)
    recorder.add(
        "map",
        {
            "category": "semantic_prior",
            "token": token("map", name),
            "filename": filename,
            "log_tokens": [token("log", name)],
        },
    )


def _map_mask(scene: Scene) -> Bytes:
    """Return the drivable area, 255 on 0, of the scene's map at 0.1 m per pixel, north up."""
    is_drivable = np.zeros(256, dtype=np.uint8)
    is_drivable[list(DRIVABLE)] = 255
    raster = Image.fromarray(is_drivable[scene.street.material])
    half, middle = scene.map_half_m / CELL_M, scene.street.extent_m / CELL_M
    cos, sin = float(np.cos(scene.heading)), float(np.sin(scene.heading))
    # Map columns run east and its rows south; raster columns run along the scene's x and its rows along y.
    affine = (cos, -sin, middle - cos * half + sin * half, -sin, -cos, middle + sin * half + cos * half)
    size = round(2 * half)
    return np.asarray(raster.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.NEAREST))
